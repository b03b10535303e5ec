//! `.kvrail/`, the folder that all instances of a directory share: its bits, and links in its place.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::{Cache, Geometry, LIMIT, config, namespace};
use kvrail::config::{FileMode, StoreConfig};
use kvrail::store::capacity::{Removals, usage};
use kvrail::{ErrorKind, OpenOptions, Store};

const STATE: &str = ".kvrail";

fn with_mode(path: &Path, mode: u32) -> StoreConfig {
    StoreConfig {
        max_size: Some(1 << 30),
        file_mode: FileMode::from_bits(mode).unwrap(),
        ..config(path)
    }
}

fn open(config: &StoreConfig) -> kvrail::Result<Store> {
    Store::open(config, namespace(), OpenOptions::default())
}

fn store_two(store: &Store) -> usize {
    let cache = Cache::attach(store, 0, Geometry::default());
    cache.store(&[(0, vec![0, 1]), (1, vec![2, 3])]).stored
}

/// Returns everything at and below a path, links not followed.
fn below(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_path_buf()];
    if path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        for entry in std::fs::read_dir(path).unwrap() {
            found.extend(below(&entry.unwrap().path()));
        }
    }
    found
}

/// Asserts the exact bits of all that is in the shared folder; returns how many files there are.
fn assert_bits(root: &Path, mode: u32) -> usize {
    let folder_mode = mode | ((mode & 0o444) >> 2);
    let mut files = 0;
    for path in below(&root.join(STATE)) {
        let metadata = path.symlink_metadata().unwrap();
        files += usize::from(metadata.is_file());
        let expected = if metadata.is_dir() { folder_mode } else { mode };
        let bits = metadata.permissions().mode() & 0o777;
        assert_eq!(
            bits,
            expected,
            "{:o} is {:o}: {}",
            mode,
            bits,
            path.display()
        );
    }
    files
}

fn note_removed(root: &std::path::Path) -> kvrail::Result<()> {
    let mut removals = Removals::open(root)?;
    removals.note(1);
    removals.end()
}

#[test]
fn what_is_shared_has_the_bits_that_were_asked_for() {
    for mode in [0o600, 0o640, 0o660, 0o664] {
        let root = tempfile::tempdir().unwrap();
        let store = open(&with_mode(root.path(), mode)).unwrap();
        assert_eq!(store_two(&store), 2);
        // The janitor's lease is taken by a thread.
        let start = Instant::now();
        while store.metrics().janitor_paths == 0 {
            assert!(start.elapsed() < LIMIT, "no janitor");
            std::thread::yield_now();
        }
        let (accounts, all) = (
            root.path().join(STATE).join("account"),
            assert_bits(root.path(), mode),
        );
        let accounts = std::fs::read_dir(accounts).unwrap().count();
        assert!(
            accounts >= 1 && all > accounts,
            "{accounts} accounts, {all} files"
        );
        // What was stored is in the account after half a second at most.
        let used = loop {
            match usage(root.path()).unwrap().bytes {
                Some(used) if used > 0 => break used,
                _ => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        };
        // A tool knows no setting: it does as those before it did.
        note_removed(root.path()).unwrap();
        assert!(assert_bits(root.path(), mode) >= all);
        assert_eq!(usage(root.path()).unwrap().bytes, Some(used - 1));
        store.close(LIMIT).unwrap();
        assert_bits(root.path(), mode);
        // One whose mode is another makes its own files with that, and changes nobody else's.
        let other = open(&with_mode(root.path(), 0o600)).unwrap();
        other.close(LIMIT).unwrap();
    }
}

#[test]
fn a_link_in_its_place_leads_nowhere() {
    for link in [STATE, ".kvrail/account"] {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().join("target");
        open(&with_mode(root.path(), 0o600))
            .unwrap()
            .close(LIMIT)
            .unwrap();
        std::fs::rename(root.path().join(link), &target).unwrap();
        symlink(&target, root.path().join(link)).unwrap();
        let before: Vec<_> = below(outside.path())
            .into_iter()
            .map(|path| {
                (
                    path.clone(),
                    path.symlink_metadata().unwrap().modified().unwrap(),
                )
            })
            .collect();
        // With a limit it is an error: the limit could not be kept.
        let error = open(&with_mode(root.path(), 0o600)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{link}: {error}");
        assert!(error.to_string().contains(STATE), "{link}: {error}");
        // Without one the store works and says that it keeps no account.
        let store = open(&config(root.path())).unwrap();
        assert_eq!(store_two(&store), 2, "{link}");
        let notices = store.take_notices();
        let told = |line: &str| notices.iter().any(|notice| notice.message.contains(line));
        assert!(told("no account is kept"), "{link}: {notices:?}");
        store.close(LIMIT).unwrap();
        assert!(usage(root.path()).is_err(), "{link}");
        // Tools, too.
        assert!(!matches!(note_removed(root.path()), Ok(()) if usage(root.path()).is_ok()));
        let after: Vec<_> = below(outside.path())
            .into_iter()
            .map(|path| {
                (
                    path.clone(),
                    path.symlink_metadata().unwrap().modified().unwrap(),
                )
            })
            .collect();
        assert_eq!(before, after, "{link}: nothing outside was touched");
    }
}
