//! The chunk files of a namespace, in the order of group, rank and key.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::super::directory::{Location, chunk_name, is_fan_out_name, parse_chunk_name, part_name};
use super::super::publish::is_missing;
use super::namespace::ranks;
use super::open_namespace;
use crate::chunk::{ChunkKey, Part};
use crate::error::Result;
use crate::io::{Folder, IoFile, OpenMode};

/// A chunk file found in a namespace directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkFile {
    /// Where it is.
    pub path: PathBuf,
    /// The KV cache group, from its folder.
    pub group: u32,
    /// The part that it holds, from its folder.
    pub rank: Part,
    /// The key, from its name.
    pub key: ChunkKey,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was published or last touched.
    pub modified: SystemTime,
    /// The file's number, by which a later one of the same name is told from it.
    pub(super) inode: u64,
    pub(super) namespace: Arc<Path>,
}

impl ChunkFile {
    /// Returns group, rank and key: what the order of chunks goes by.
    pub fn place(&self) -> (u32, Part, ChunkKey) {
        (self.group, self.rank, self.key)
    }

    /// Removes the file; `false` when it had gone already, or another one has its name by now.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn remove(&self) -> Result<bool> {
        let Some(folder) = missing_is_none(self.folder())? else {
            return Ok(false);
        };
        let name = chunk_name(&self.key);
        match folder.status(&name)? {
            Some(status) if status.inode == self.inode => {}
            _ => return Ok(false),
        }
        Ok(missing_is_none(folder.remove_file(&name))?.is_some())
    }

    /// Opens the file, through no symbolic link.
    pub(super) fn open(&self) -> Result<IoFile> {
        let below = Location::chunk(self.group, self.rank, &self.key).below();
        IoFile::open_in(
            &open_namespace(&self.namespace)?,
            below,
            OpenMode::Read,
            false,
        )
    }

    fn folder(&self) -> Result<Folder> {
        let location = Location::chunk(self.group, self.rank, &self.key);
        open_namespace(&self.namespace)?.folder(location.folder.unwrap_or_default())
    }
}

/// Walks the chunks of a namespace directory, sorted by group, rank and key; in memory is one
/// folder at a time, a 4096th of a group's rank.
///
/// Names that are none of a chunk are passed over; a folder that cannot be read is one error.
pub fn chunks(namespace_directory: &Path) -> impl Iterator<Item = Result<ChunkFile>> + use<> {
    walk(namespace_directory, None)
}

/// As [`chunks`], from behind the place `after` on, for work that goes on where it stopped.
pub fn chunks_after(
    namespace_directory: &Path,
    after: (u32, Part, ChunkKey),
) -> impl Iterator<Item = Result<ChunkFile>> + use<> {
    walk(namespace_directory, Some(after))
}

/// Finds the chunk of a place, `None` when it is not there.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
pub fn find_chunk(
    namespace_directory: &Path,
    (group, rank, key): (u32, Part, ChunkKey),
) -> Result<Option<ChunkFile>> {
    let below = Location::chunk(group, rank, &key).below();
    let status = open_namespace(namespace_directory)?.status(&below)?;
    Ok(status.map(|status| ChunkFile {
        path: namespace_directory.join(below),
        group,
        rank,
        key,
        bytes: status.bytes,
        modified: status.modified,
        inode: status.inode,
        namespace: Arc::from(namespace_directory),
    }))
}

fn walk(
    directory: &Path,
    after: Option<(u32, Part, ChunkKey)>,
) -> impl Iterator<Item = Result<ChunkFile>> + use<> {
    let directory: Arc<Path> = Arc::from(directory);
    let folders = fan_outs(&directory, after).unwrap_or_else(|error| vec![Err(error)]);
    folders.into_iter().flat_map(move |folder| {
        let files = folder.and_then(|folder| files(&directory, &folder, after));
        files.unwrap_or_else(|error| vec![Err(error)])
    })
}

/// A fan-out folder: group, rank and three digits.
type FanOut = (u32, Part, String);

/// Lists the fan-out folders that may have chunks behind `after`, sorted.
fn fan_outs(directory: &Path, after: Option<(u32, Part, ChunkKey)>) -> Result<Vec<Result<FanOut>>> {
    let namespace = open_namespace(directory)?;
    let first = after.map(|(group, rank, key)| {
        let digits: String = key.to_string().chars().take(3).collect();
        (group, rank, digits)
    });
    let mut all = Vec::new();
    for (group, rank) in ranks(&namespace)? {
        let listed = list_fan_outs(&namespace, group, rank);
        match listed {
            Ok(Some(mut names)) => {
                names.sort_unstable();
                let folders = names.into_iter().map(|name| (group, rank, name));
                let wanted = folders.filter(|folder| first.as_ref() <= Some(folder));
                all.extend(wanted.map(Ok));
            }
            Ok(None) => {}
            Err(error) => all.push(Err(error)),
        }
    }
    Ok(all)
}

fn list_fan_outs(namespace: &Folder, group: u32, rank: Part) -> Result<Option<Vec<String>>> {
    let Some(folder) = missing_is_none(namespace.folder(part_name(group, rank)))? else {
        return Ok(None);
    };
    let mut names = Vec::new();
    for name in folder.names()? {
        let name = name?.into_string().ok();
        names.extend(name.filter(|name| is_fan_out_name(name)));
    }
    Ok(Some(names))
}

/// Lists the chunks of a fan-out folder behind `after`, sorted.
fn files(
    directory: &Arc<Path>,
    (group, rank, fan_out): &FanOut,
    after: Option<(u32, Part, ChunkKey)>,
) -> Result<Vec<Result<ChunkFile>>> {
    let below = format!("{}/{fan_out}", part_name(*group, *rank));
    let namespace = open_namespace(directory)?;
    let Some(folder) = missing_is_none(namespace.folder(&below))? else {
        return Ok(Vec::new());
    };
    let mut keys = Vec::new();
    for name in folder.names()? {
        let key = name?.to_str().and_then(parse_chunk_name);
        // A chunk in another one's folder is found by nobody, so it is none.
        keys.extend(key.filter(|key| chunk_name(key).starts_with(fan_out)));
    }
    keys.retain(|key| after.is_none_or(|after| (*group, *rank, *key) > after));
    keys.sort_unstable();
    let found = keys.into_iter().filter_map(|key| {
        let name = chunk_name(&key);
        let status = match folder.status(&name) {
            Ok(status) => status?,
            Err(error) => return Some(Err(error)),
        };
        Some(Ok(ChunkFile {
            path: folder.path().join(&name),
            group: *group,
            rank: *rank,
            key,
            bytes: status.bytes,
            modified: status.modified,
            inode: status.inode,
            namespace: Arc::clone(directory),
        }))
    });
    Ok(found.collect())
}

/// What has gone while it was being looked at is nothing.
fn missing_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if is_missing(&error) => Ok(None),
        result => result.map(Some),
    }
}
