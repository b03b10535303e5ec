//! The chunks of a directory as a shelf: slices are folders, stamps are modification times.
//!
//! Each folder is opened below the path's and without following a symbolic link, so
//! nothing outside of the store is ever removed; and only what has a chunk's name is looked at. A
//! file that a load holds open keeps its bytes until that closes it, as POSIX has it; on a network
//! file system the load may fail with `ESTALE`, which is a miss.

use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, statat};

use super::eviction_log::{self, Eviction, EvictionReason};
use super::progress::Progress;
use super::root::Root;
use super::stamp::Stamp;
use super::steps::{Step, StepHook, reach};
use super::sweep::{Reason, Shelf, Visit};
use crate::chunk::{ChunkKey, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Folder;
use crate::store::directory::{
    MANIFEST_NAME, QUARANTINE_NAME, TEMPORARY_NAME, chunk_name, is_fan_out_name, parse_chunk_name,
    parse_part_name,
};
use crate::store::namespace::parse_directory_name;
use crate::store::publish::is_gone;
use crate::store::quarantine;
use crate::store::writer::{Leftovers, remove_leftovers};

/// Folders `g<group>r<rank>` of all namespaces that one janitor looks at.
const RANK_FOLDERS_MAX: usize = 100_000;
/// Chunks that are removed in one go: what is kept in memory of a folder, however large it is.
const BATCH_MAX: usize = 1024;

/// A folder of a namespace that holds the chunks of one group on one rank.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RankFolder {
    namespace: String,
    name: String,
    group: u32,
    rank: Part,
}

/// A chunk that is to be removed.
struct Candidate {
    key: ChunkKey,
    stamp: Stamp,
    bytes: u64,
    reason: Reason,
}

/// All chunks below a path, or those of one namespace.
#[derive(Debug)]
pub(super) struct FileShelf {
    root: Root,
    only: Option<String>,
    folders: Vec<RankFolder>,
    /// Whether removals are only counted.
    pub(super) dry_run: bool,
    /// Removals are somebody's request, whatever the rule was.
    pub(super) by_request: bool,
    /// What the eviction log says about the time, in milliseconds since 1970.
    pub(super) now_milliseconds: i64,
    hook: Option<Arc<StepHook>>,
    progress: Arc<Progress>,
}

impl FileShelf {
    pub(super) fn new(root: Root, only: Option<String>) -> Self {
        Self {
            root,
            only,
            folders: Vec::new(),
            dry_run: false,
            by_request: false,
            now_milliseconds: 0,
            hook: None,
            progress: Arc::default(),
        }
    }

    /// Tells others of each step.
    pub(super) fn observed(self, hook: Option<Arc<StepHook>>, progress: Arc<Progress>) -> Self {
        Self {
            hook,
            progress,
            ..self
        }
    }

    /// Finds out which folders there are. Returns whether that has changed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the path or a namespace cannot be read.
    pub(super) fn refresh(&mut self) -> Result<bool> {
        let mut folders = Vec::new();
        for namespace in self.namespaces()? {
            self.progress.step();
            for name in names(&namespace.folder)? {
                if let Some((group, rank)) = parse_part_name(&name) {
                    folders.push(RankFolder {
                        namespace: namespace.name.clone(),
                        name,
                        group,
                        rank,
                    });
                }
            }
            if folders.len() > RANK_FOLDERS_MAX {
                let message = format!("more than {RANK_FOLDERS_MAX} folders of chunks");
                return Err(Error::new(ErrorKind::Io, message).with_path(self.root.path()));
            }
        }
        folders.sort();
        let changed = folders != self.folders;
        self.folders = folders;
        Ok(changed)
    }

    /// Returns the namespaces: folders, no links, that have a namespace's name and a manifest.
    ///
    /// One that is removed meanwhile is none.
    pub(super) fn namespaces(&self) -> Result<Vec<OpenNamespace>> {
        let root = self.root.open()?;
        let mut found = Vec::new();
        for name in names(&root)? {
            let is_asked_for = self.only.as_ref().is_none_or(|only| *only == name);
            if !is_asked_for || parse_directory_name(&name).is_none() {
                continue;
            }
            self.progress.step();
            let Some(folder) = found_or_none(root.folder(&name))? else {
                continue;
            };
            if folder
                .status(MANIFEST_NAME)?
                .is_some_and(|status| status.is_file)
            {
                found.push(OpenNamespace { name, folder });
            }
        }
        Ok(found)
    }

    /// Returns what lies in quarantine, which counts as usage and is bounded on its own.
    pub(super) fn quarantined(&self) -> Result<Visit> {
        let mut visit = Visit::default();
        for namespace in self.namespaces()? {
            self.progress.step();
            let Some(folder) = found_or_none(namespace.folder.folder(QUARANTINE_NAME))? else {
                continue;
            };
            for name in quarantine::list(&folder)? {
                match folder.status(name.to_string())? {
                    Some(status) if status.is_file => visit.kept.add(status.bytes),
                    Some(_) => {}
                    None => visit.unseen += 1,
                }
            }
        }
        Ok(visit)
    }

    /// Removes temp files that dead writers left, in all namespaces.
    pub(super) fn remove_leftovers(&self) -> Result<Leftovers> {
        let mut found = Leftovers::default();
        for namespace in self.namespaces()? {
            self.progress.step();
            if let Some(folder) = found_or_none(namespace.folder.folder(TEMPORARY_NAME))? {
                found.add(remove_leftovers(&folder)?);
            }
        }
        Ok(found)
    }

    /// Removes folders of slices that are empty. Returns how many went.
    ///
    /// A store that is just putting a chunk into one makes it again.
    pub(super) fn remove_empty_folders(&self) -> Result<u64> {
        let root = self.root.open()?;
        let mut removed = 0;
        for rank in &self.folders {
            let below = format!("{}/{}", rank.namespace, rank.name);
            let Some(folder) = found_or_none(root.folder(below))? else {
                continue;
            };
            for name in names(&folder)? {
                // The system refuses whatever is not empty, not a folder, or a link to one.
                removed += u64::from(is_fan_out_name(&name) && folder.remove_folder(&name).is_ok());
            }
        }
        Ok(removed)
    }

    /// Visits one folder of a slice.
    fn visit_folder(
        &self,
        folder: &RankFolder,
        slice: &str,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> Result<()> {
        let below = format!("{}/{}/{slice}", folder.namespace, folder.name);
        let Some(directory) = found_or_none(self.root.open()?.folder(below))? else {
            return Ok(());
        };
        let mut batch = Vec::new();
        for name in directory.names()? {
            let name = name?;
            let Some(key) = name.to_str().and_then(|name| key_of(name, slice)) else {
                continue;
            };
            self.progress.step();
            let Ok(stat) = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) else {
                // Removed by somebody else at this very moment, or the file system errs. Not to be
                // taken for gone: its room would be given away.
                visit.unseen += 1;
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                continue;
            }
            let bytes = u64::try_from(stat.st_size).unwrap_or_default();
            let stamp = Stamp::of(&stat);
            match judge(stamp, bytes) {
                None => visit.kept.add(bytes),
                Some(reason) => batch.push(Candidate {
                    key,
                    stamp,
                    bytes,
                    reason,
                }),
            }
            if batch.len() == BATCH_MAX {
                self.remove(&directory, folder, &mut batch, visit);
            }
        }
        self.remove(&directory, folder, &mut batch, visit);
        Ok(())
    }

    /// Removes a batch and writes down that it is gone.
    fn remove(
        &self,
        directory: &Folder,
        folder: &RankFolder,
        batch: &mut Vec<Candidate>,
        visit: &mut Visit,
    ) {
        let mut evictions = Vec::new();
        for candidate in batch.drain(..) {
            let Candidate {
                key,
                stamp,
                bytes,
                reason,
            } = candidate;
            self.progress.step();
            reach(self.hook.as_ref(), Step::Removing);
            if !self.dry_run {
                match directory.remove_file(chunk_name(&key)) {
                    Ok(()) => {}
                    // Somebody else removed and counted it, or the file system errs.
                    Err(error) if is_gone(&error) => {
                        visit.unseen += 1;
                        continue;
                    }
                    Err(_) => {
                        visit.kept.add(bytes);
                        continue;
                    }
                }
            }
            reach(self.hook.as_ref(), Step::Removed);
            visit.add_removed(reason, bytes);
            evictions.push(Eviction {
                evicted_milliseconds: self.now_milliseconds,
                reason: if self.by_request {
                    EvictionReason::Request
                } else {
                    reason.into()
                },
                group: folder.group,
                rank: folder.rank,
                key,
                used_milliseconds: stamp.milliseconds(),
                uses: stamp.uses(),
                bytes,
            });
        }
        if !self.dry_run && !evictions.is_empty() {
            // The trace is for people: that it cannot be written must not stop eviction.
            let namespace = self
                .root
                .open()
                .and_then(|root| root.folder(&folder.namespace));
            drop(namespace.and_then(|namespace| eviction_log::append(&namespace, &evictions)));
            reach(self.hook.as_ref(), Step::Logged);
        }
    }
}

impl Shelf for FileShelf {
    fn visit(
        &mut self,
        slice: u16,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> Result<()> {
        let slice = format!("{slice:03x}");
        let mut result = Ok(());
        for folder in &self.folders {
            self.progress.step();
            // One that fails keeps the others from nothing.
            result = result.and(self.visit_folder(folder, &slice, judge, visit));
        }
        result
    }
}

/// A namespace whose folder is open.
#[derive(Debug)]
pub(super) struct OpenNamespace {
    pub(super) name: String,
    pub(super) folder: Folder,
}

/// Returns the chunk of a file name that belongs into a slice's folder.
fn key_of(name: &str, slice: &str) -> Option<ChunkKey> {
    parse_chunk_name(name).filter(|_| name.starts_with(slice))
}

/// Lists the names in a folder that are text: those of ours are.
pub(super) fn names(folder: &Folder) -> Result<Vec<String>> {
    let texts = folder
        .names()?
        .filter_map(|name| name.map(|name| name.into_string().ok()).transpose());
    texts.collect()
}

/// Turns the error for a folder that is not there, or has a link or a file in its place, into none.
pub(super) fn found_or_none(folder: Result<Folder>) -> Result<Option<Folder>> {
    use rustix::io::Errno;
    match folder {
        Ok(folder) => Ok(Some(folder)),
        Err(error) => {
            let number = error.os_error().and_then(std::io::Error::raw_os_error);
            let none = [Errno::NOENT, Errno::LOOP, Errno::NOTDIR];
            match none
                .iter()
                .any(|errno| Some(errno.raw_os_error()) == number)
            {
                true => Ok(None),
                false => Err(error),
            }
        }
    }
}
