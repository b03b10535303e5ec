//! Bad chunks that could not be put out of the way, so that none is loaded a second time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::present::Place;
use crate::io::FileStatus;

/// Chunks remembered. Only mounts that cannot be written have any; a store with more bad chunks
/// than this there reads some of them again.
const CHUNKS_MAX: usize = 4096;

/// The bad files that stay where they are, on a mount that is read-only for instance.
///
/// A file is known by its number and time: one that took its place is another one.
#[derive(Debug, Default)]
pub(super) struct BadChunks {
    known: Mutex<HashMap<Place, FileStatus>>,
    /// As many as are known, so that who knows of none pays for no lock.
    count: AtomicUsize,
}

impl BadChunks {
    /// Notes a file that was found bad and stays.
    pub(super) fn insert(&self, place: Place, status: FileStatus) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CHUNKS_MAX {
            known.clear();
        }
        known.insert(place, status);
        self.count.store(known.len(), Ordering::Release);
    }

    /// Returns whether a file is known to be bad. `status` is asked for only where one may be.
    pub(super) fn holds(&self, place: &Place, status: impl FnOnce() -> Option<FileStatus>) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bad) = known.get(place).copied() else {
            return false;
        };
        drop(known);
        if status() == Some(bad) {
            return true;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(place);
        self.count.store(known.len(), Ordering::Release);
        false
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::chunk::ChunkKey;

    #[test]
    fn another_file_in_its_place_is_not_bad_and_the_number_is_bounded() {
        let bad = BadChunks::default();
        let place = |index: u64| {
            (
                0,
                0.into(),
                ChunkKey::from_bytes(&index.to_le_bytes()).unwrap(),
            )
        };
        let status = |inode| FileStatus {
            is_file: true,
            is_folder: false,
            bytes: 4096,
            inode,
            modified: SystemTime::UNIX_EPOCH,
        };
        assert!(!bad.holds(&place(1), || panic!("nothing is known")));
        bad.insert(place(1), status(7));
        assert!(!bad.holds(&place(2), || panic!("not this one")));
        assert!(bad.holds(&place(1), || Some(status(7))));
        assert!(!bad.holds(&place(1), || Some(status(8))));
        assert!(!bad.holds(&place(1), || Some(status(7))), "forgotten");
        (0..3 * CHUNKS_MAX as u64).for_each(|index| bad.insert(place(index), status(index)));
        assert!(bad.known.lock().unwrap().len() <= CHUNKS_MAX);
    }
}
