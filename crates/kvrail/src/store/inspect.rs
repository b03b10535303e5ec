//! Reading a store without KV cache: what tools list and verify.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value;

use super::directory::{CHUNK_SUFFIX, MANIFEST_NAME, QUARANTINE_NAME, TEMPORARY_NAME};
use super::manifest::read_manifest;
use crate::chunk::{ChunkFormat, ChunkHead, ChunkKey, PAGE_BYTES, PageTable};
use crate::chunk::{first_bad_page, root_checksum};
use crate::error::{Error, ErrorKind, Result};

/// Pages read and verified at a time.
const PAGES_AT_A_TIME: usize = 256;

/// A namespace found on a path.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NamespaceInfo {
    /// Its directory.
    pub directory: PathBuf,
    /// Its manifest, or why it cannot be read.
    pub manifest: Result<Value, String>,
    /// The (group, rank) pairs that have chunks.
    pub groups: Vec<(u32, u32)>,
    /// Files being written, or left by writers that died.
    pub temporary_files: usize,
    /// Chunks that were set aside.
    pub quarantined: usize,
}

/// A chunk file found in a namespace directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkFile {
    /// Where it is.
    pub path: PathBuf,
    /// The KV cache group, from its folder.
    pub group: u32,
    /// The rank, from its folder.
    pub rank: u32,
    /// The key, from its name.
    pub key: ChunkKey,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was published or last touched.
    pub modified: SystemTime,
}

/// What a verified chunk says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChunkSummary {
    /// Tokens.
    pub tokens: u64,
    /// Payload bytes.
    pub payload_bytes: u64,
    /// Key of the chunk before it, hex.
    pub parent: Option<String>,
    /// Shape of the payload: blocks, layers or 1, bytes.
    pub shape: [u64; 3],
}

/// Lists the namespaces on a path: its folders that have a manifest.
///
/// # Errors
/// [`ErrorKind::Io`] when the path cannot be read.
pub fn namespaces(path: &Path) -> Result<Vec<NamespaceInfo>> {
    let mut found = Vec::new();
    for entry in read_directory(path)? {
        let directory = entry?;
        if !directory.join(MANIFEST_NAME).is_file() {
            continue;
        }
        let manifest = read_manifest(&directory.join(MANIFEST_NAME));
        let mut groups: Vec<(u32, u32)> = rank_folders(&directory)?
            .into_iter()
            .map(|(group, rank, _)| (group, rank))
            .collect();
        groups.sort_unstable();
        let count = |name: &str| {
            read_directory(&directory.join(name))
                .map(Iterator::count)
                .unwrap_or_default()
        };
        found.push(NamespaceInfo {
            manifest: manifest.map_err(|error| error.to_string()),
            groups,
            temporary_files: count(TEMPORARY_NAME),
            quarantined: count(QUARANTINE_NAME),
            directory,
        });
    }
    found.sort_by(|left, right| left.directory.cmp(&right.directory));
    Ok(found)
}

/// Walks the chunks of a namespace directory, one folder at a time.
///
/// Names that are none of a chunk are passed over; a folder that cannot be read is one error.
pub fn chunks(namespace_directory: &Path) -> impl Iterator<Item = Result<ChunkFile>> + use<> {
    let ranks = match rank_folders(namespace_directory) {
        Ok(ranks) => ranks.into_iter().map(Ok).collect::<Vec<_>>(),
        Err(error) => vec![Err(error)],
    };
    ranks.into_iter().flat_map(|folder| match folder {
        Ok((group, rank, path)) => Entries::of(&path, move |fan_out| {
            Entries::of(&fan_out, move |file| chunk_file(file, group, rank))
        }),
        Err(error) => Entries::error(error),
    })
}

/// A lazy walk that may be an error instead.
type Entries = Box<dyn Iterator<Item = Result<ChunkFile>>>;

trait Walk {
    fn of(path: &Path, each: impl Fn(PathBuf) -> Entries + 'static) -> Entries;
    fn error(error: Error) -> Entries;
}

impl Walk for Entries {
    fn of(path: &Path, each: impl Fn(PathBuf) -> Entries + 'static) -> Entries {
        match read_directory(path) {
            Ok(entries) => Box::new(entries.flat_map(move |entry| match entry {
                Ok(path) => each(path),
                Err(error) => Self::error(error),
            })),
            Err(error) => Self::error(error),
        }
    }

    fn error(error: Error) -> Entries {
        Box::new(std::iter::once(Err(error)))
    }
}

/// Returns the chunk of a path, nothing for other names or one that has just gone.
fn chunk_file(path: PathBuf, group: u32, rank: u32) -> Entries {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let key = name
        .as_deref()
        .and_then(|name| name.strip_suffix(CHUNK_SUFFIX))
        .and_then(|name| ChunkKey::from_hex(name).ok());
    let (Some(key), Ok(metadata)) = (key, std::fs::symlink_metadata(&path)) else {
        return Box::new(std::iter::empty());
    };
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let bytes = metadata.len();
    Box::new(std::iter::once(Ok(ChunkFile {
        path,
        group,
        rank,
        key,
        bytes,
        modified,
    })))
}

/// Returns the folders `g<group>r<rank>` of a namespace.
fn rank_folders(directory: &Path) -> Result<Vec<(u32, u32, PathBuf)>> {
    let mut folders = Vec::new();
    for entry in read_directory(directory)? {
        let path = entry?;
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let numbers = name
            .as_deref()
            .and_then(|name| name.strip_prefix('g')?.split_once('r'));
        if let Some((group, rank)) = numbers
            && let (Ok(group), Ok(rank)) = (group.parse(), rank.parse())
        {
            folders.push((group, rank, path));
        }
    }
    folders.sort();
    Ok(folders)
}

/// Lists a directory as paths.
fn read_directory(path: &Path) -> Result<impl Iterator<Item = Result<PathBuf>> + use<>> {
    let shown = path.to_path_buf();
    let entries =
        std::fs::read_dir(path).map_err(|source| Error::io("read directory", path, source))?;
    Ok(entries.map(move |entry| {
        entry
            .map(|entry| entry.path())
            .map_err(|source| Error::io("read directory", &shown, source))
    }))
}

/// Verifies a chunk whole: head against name, place and manifest, page table, every page, padding.
///
/// # Errors
/// [`ErrorKind::Damaged`] with what is wrong, [`ErrorKind::Io`] when it cannot be read.
pub fn verify_chunk(file: &ChunkFile, manifest: &Value) -> Result<ChunkSummary> {
    verify(file, manifest).map_err(|error| match error.path() {
        Some(_) => error,
        None => error.with_path(&file.path),
    })
}

fn verify(chunk: &ChunkFile, manifest: &Value) -> Result<ChunkSummary> {
    let damaged = |message: String| Error::new(ErrorKind::Damaged, message);
    let metadata = std::fs::symlink_metadata(&chunk.path)
        .map_err(|source| Error::io("stat", &chunk.path, source))?;
    if !metadata.is_file() {
        return Err(damaged("not a regular file".into()));
    }
    let file = File::open(&chunk.path).map_err(|source| Error::io("open", &chunk.path, source))?;
    let read = |offset: usize, buffer: &mut [u8]| {
        file.read_exact_at(buffer, offset as u64)
            .map_err(|source| match source.kind() {
                std::io::ErrorKind::UnexpectedEof => damaged("shorter than its head says".into()),
                _ => Error::io("read", &chunk.path, source),
            })
    };
    let mut head = vec![0; PAGE_BYTES];
    read(0, &mut head)?;
    let head = ChunkHead::decode(&head)?;
    check_identity(chunk, &head, manifest)?;
    let format = head.format;
    if metadata.len() != format.file_bytes() as u64 {
        let message = format!(
            "expected {} bytes, got {}",
            format.file_bytes(),
            metadata.len()
        );
        return Err(damaged(message));
    }
    let mut table = vec![0; format.table_bytes()];
    read(format.table_offset(), &mut table)?;
    if root_checksum(&table) != head.root {
        return Err(damaged(
            "page table does not match the root checksum".into(),
        ));
    }
    let table = PageTable::decode(&format, &table)
        .ok_or_else(|| damaged("page table has entries behind the last page".into()))?;
    verify_pages(&format, &table, read)?;
    Ok(ChunkSummary {
        tokens: head.fields.tokens as u64,
        payload_bytes: format.payload_bytes() as u64,
        parent: head.fields.chunk.parent.map(|key| key.to_string()),
        shape: format.shape().map(|side| side as u64),
    })
}

fn check_identity(chunk: &ChunkFile, head: &ChunkHead, manifest: &Value) -> Result<()> {
    let text = serde_json::to_vec(manifest).unwrap_or_default();
    let id: String = blake3::hash(&text).to_hex().chars().take(16).collect();
    let fields = &head.fields;
    for (what, found, expected) in [
        ("key", fields.chunk.key.to_string(), chunk.key.to_string()),
        ("group", fields.group.to_string(), chunk.group.to_string()),
        ("rank", fields.rank.to_string(), chunk.rank.to_string()),
        ("namespace", fields.namespace.clone(), id),
    ] {
        if found != expected {
            let message = format!("head: {what} is {found}, expected {expected}");
            return Err(Error::new(ErrorKind::Damaged, message));
        }
    }
    Ok(())
}

fn verify_pages(
    format: &ChunkFormat,
    table: &PageTable,
    read: impl Fn(usize, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let count = format.page_count();
    let mut buffer = vec![0; PAGES_AT_A_TIME * PAGE_BYTES];
    for first in (0..count).step_by(PAGES_AT_A_TIME) {
        let pages = PAGES_AT_A_TIME.min(count - first);
        let buffer = super::image::bytes_mut(&mut buffer, 0..pages * PAGE_BYTES)?;
        read(format.payload_offset() + first * PAGE_BYTES, buffer)?;
        if let Some(index) = first_bad_page(buffer, table.pages(first..first + pages)) {
            let message = format!(
                "page {} of {count} does not match its checksum",
                first + index
            );
            return Err(Error::new(ErrorKind::Damaged, message));
        }
    }
    Ok(())
}
