//! Which folders are known to survive a power failure.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, StatxFlags};

use super::directory::NamespaceDirectory;
use crate::error::Result;
use crate::io::Folder;

/// Folders remembered: all of a store with sixteen ranks, about 5 MB.
const FOLDERS_MAX: usize = 65_536;

/// Identity of a folder: number and birth. A number alone is given again when a folder is removed.
type Identity = (u64, i64, u32);

/// The folders whose own names were made durable by this process.
///
/// A folder may be seen before whoever made it has synced its parent. So the first time that a
/// chunk is published there, its parents are synced, up to the path that holds the namespaces;
/// where the file system does not say when a folder was born, every time.
#[derive(Debug, Default)]
pub(super) struct SyncedFolders {
    known: Mutex<HashMap<String, Identity>>,
}

impl SyncedFolders {
    /// Makes the name `below` in `namespace` durable, of which `folder` is the open folder.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): the name may be lost in a power failure.
    pub(super) fn ensure(
        &self,
        directory: &NamespaceDirectory,
        namespace: &Folder,
        below: &str,
        folder: &Folder,
    ) -> Result<()> {
        let identity = identity(folder);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if identity.is_some() && known.get(below).copied() == identity {
            return Ok(());
        }
        drop(known);
        // From the last folder's parent up. The root's own name was synced when it was opened.
        let ends = below.match_indices('/').map(|(at, _)| at);
        for parent in ends.rev().filter_map(|end| below.get(..end)) {
            namespace.folder(parent)?.sync()?;
        }
        namespace.sync()?;
        directory.open_root()?.sync()?;
        if let Some(identity) = identity {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= FOLDERS_MAX {
                // Forgetting costs two syncs for each folder that comes again.
                known.clear();
            }
            known.insert(below.to_owned(), identity);
        }
        Ok(())
    }
}

fn identity(folder: &Folder) -> Option<Identity> {
    let wanted = StatxFlags::INO | StatxFlags::BTIME;
    let found = rustix::fs::statx(folder.as_fd(), "", AtFlags::EMPTY_PATH, wanted).ok()?;
    let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    has_birth.then_some((
        found.stx_ino,
        found.stx_btime.tv_sec,
        found.stx_btime.tv_nsec,
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::Namespace;
    use super::*;
    use crate::io::{FolderRules, Observer, Step};

    #[test]
    fn parents_are_synced_once_for_each_folder_that_is_born() {
        let root = tempfile::tempdir().unwrap();
        let syncs = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&syncs);
        let rules = FolderRules {
            observer: Some(Observer::new(move |step| {
                if matches!(step, Step::SyncFolder(_)) {
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            })),
            ..FolderRules::default()
        };
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(root.path(), &namespace).with_rules(rules);
        directory.make(false).unwrap();
        let synced = SyncedFolders::default();
        let ensure = || {
            let namespace = directory.open().unwrap();
            let folder = namespace.make("g0r0/abc", false).unwrap();
            synced
                .ensure(&directory, &namespace, "g0r0/abc", &folder)
                .unwrap();
            syncs.swap(0, Ordering::Relaxed)
        };
        assert_eq!(ensure(), 3);
        let again = ensure();
        if identity(&directory.open().unwrap()).is_none() {
            eprintln!("skipped in part: this file system does not say when a folder was born");
            assert_eq!(again, 3);
            return;
        }
        assert_eq!(again, 0);
        std::fs::remove_dir(directory.path().join("g0r0/abc")).unwrap();
        assert_eq!(ensure(), 3);
    }
}
