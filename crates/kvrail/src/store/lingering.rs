//! Temp files of this store that are of no use any more and could not be removed yet.
//!
//! They take room: their bytes stay claimed until they are gone, which is tried again and again. What
//! is left when the process ends is a leftover for others, as after a crash.

// Not the models' lock: it is asked for inside that of an account, which is std's.
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::publish::is_missing;
use crate::io::Folder;

/// Files whose names are kept. Those beyond stay claimed for the life of the store.
const FILES_MAX: usize = 4096;
/// Files that are tried in one go: each may take as long as a file system takes to say no.
const TRIED_MAX: usize = 64;

/// The temp files of one path that are to go.
#[derive(Debug, Default)]
pub(super) struct LingeringFiles {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<LingeringFile>,
    /// Bytes of files whose names are not known, or that may have another name by now.
    unknown_bytes: u64,
}

#[derive(Debug)]
struct LingeringFile {
    name: String,
    bytes: u64,
}

impl LingeringFiles {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a file in the folder of temp files that could not be removed.
    pub(super) fn add(&self, name: String, bytes: u64) {
        let mut state = self.lock();
        if state.files.len() < FILES_MAX {
            state.files.push(LingeringFile { name, bytes });
        } else {
            state.unknown_bytes = state.unknown_bytes.saturating_add(bytes);
        }
    }

    /// Takes note of a file of which the system did not say whether it got its new name.
    pub(super) fn add_unknown(&self, bytes: u64) {
        let mut state = self.lock();
        state.unknown_bytes = state.unknown_bytes.saturating_add(bytes);
    }

    /// Returns the bytes of all of them.
    pub(super) fn bytes(&self) -> u64 {
        let state = self.lock();
        let files = state.files.iter().map(|file| file.bytes);
        files.fold(state.unknown_bytes, u64::saturating_add)
    }

    /// Returns whether there is one to remove.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().files.is_empty()
    }

    /// Tries to remove some from the folder of temp files.
    pub(super) fn remove(&self, folder: &Folder) {
        let tried: Vec<LingeringFile> = {
            let mut state = self.lock();
            let count = state.files.len().min(TRIED_MAX);
            state.files.drain(..count).collect()
        };
        for file in tried {
            match folder.remove_file(&file.name) {
                Err(error) if !is_missing(&error) => self.add(file.name, file.bytes),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::FolderRules;

    #[test]
    fn what_cannot_be_removed_stays_until_it_can() {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(directory.path(), FolderRules::default()).unwrap();
        let lingering = LingeringFiles::default();
        std::fs::write(directory.path().join("a"), "1").unwrap();
        // What `remove_file` refuses as a file system out of order does.
        std::fs::create_dir(directory.path().join("b")).unwrap();
        for name in ["a", "b", "gone"] {
            lingering.add(name.to_owned(), 10);
        }
        assert_eq!(lingering.bytes(), 30);
        lingering.remove(&folder);
        assert_eq!(lingering.bytes(), 10);
        assert!(!directory.path().join("a").exists() && !lingering.is_empty());
        std::fs::remove_dir(directory.path().join("b")).unwrap();
        std::fs::write(directory.path().join("b"), "1").unwrap();
        lingering.remove(&folder);
        assert_eq!(lingering.bytes(), 0);
        assert!(!directory.path().join("b").exists());
    }

    #[test]
    fn names_are_bounded_and_bytes_are_not_forgotten() {
        let lingering = LingeringFiles::default();
        for number in 0..FILES_MAX + 10 {
            lingering.add(number.to_string(), 10);
        }
        lingering.add_unknown(5);
        assert_eq!(lingering.bytes(), 10 * (FILES_MAX as u64 + 10) + 5);
        assert_eq!(lingering.lock().files.len(), FILES_MAX);
    }
}
