//! A directory that others may write to: no link leads outside, nothing is readable that need not be.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Cache, Geometry, LIMIT, chunk_path, config, key, namespace, open, wait_until};
use kvrail::config::FileMode;
use kvrail::store::inspect;
use kvrail::{OpenOptions, Store};

/// Names the directory and the mode of the process with another umask.
const CHILD: &str = "KVRAIL_TEST_UMASK_CHILD";

/// Returns all below a directory with its permission bits, links not followed.
fn bits(directory: &Path) -> BTreeMap<PathBuf, u32> {
    let mut found = BTreeMap::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            found.insert(path, metadata.permissions().mode() & 0o777);
        }
    }
    found
}

/// Stores a chunk, damages it and loads it, so that everything a store makes is there.
fn make_everything(path: &Path, mode: u32) {
    let mut config = config(path);
    config.file_mode = FileMode::from_bits(mode).unwrap();
    let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(0, vec![0, 1]), (1, vec![2, 3])]);
    let chunk = chunk_path(path, 0, 0);
    let bytes = std::fs::read(&chunk).unwrap();
    std::fs::write(&chunk, &bytes[1..]).unwrap();
    assert_eq!(cache.load(&[(0, 0, vec![0, 1])]).failed, [0]);
}

#[test]
fn files_and_folders_have_the_bits_that_were_asked_for_whatever_the_umask() {
    for (mode, folder_mode) in [
        (0o600, 0o700),
        (0o640, 0o750),
        (0o660, 0o770),
        (0o664, 0o775),
    ] {
        for umask in ["0", "22", "77", "27"] {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join("made/here");
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "child", "--nocapture"])
                .env(CHILD, format!("{umask}:{mode:o}:{}", path.display()))
                .output()
                .unwrap();
            assert!(
                child.status.success(),
                "{}",
                String::from_utf8_lossy(&child.stderr)
            );
            let found = bits(root.path());
            let kinds = [
                "manifest.json",
                "tmp",
                "quarantine",
                ".safetensors",
                ".json",
                "g0r0",
            ];
            for kind in kinds {
                let some = found
                    .keys()
                    .any(|path| path.to_string_lossy().ends_with(kind));
                assert!(some, "no {kind} in {found:?}");
            }
            for (path, bits) in found {
                let expected = if path.is_dir() { folder_mode } else { mode };
                assert_eq!(bits, expected, "{} with umask {umask}", path.display());
            }
        }
    }
}

/// Not a test of its own: the process that the one above starts, as a umask is a process's.
#[test]
#[ignore = "runs as the child of another test"]
fn child() {
    let Ok(work) = std::env::var(CHILD) else {
        eprintln!("skipped: only meant to be started by another test");
        return;
    };
    let mut parts = work.splitn(3, ':');
    let mut octal = || u32::from_str_radix(parts.next().unwrap(), 8).unwrap();
    let (umask, mode) = (octal(), octal());
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
    make_everything(Path::new(parts.next().unwrap()), mode);
}

#[test]
fn a_group_s_folders_keep_the_group_that_they_were_given() {
    let root = tempfile::tempdir().unwrap();
    // As an administrator would: chmod g+s.
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o2770)).unwrap();
    let group = 4242;
    if std::os::unix::fs::chown(root.path(), None, Some(group)).is_err() {
        eprintln!("skipped: giving a directory to another group needs root");
        return;
    }
    make_everything(root.path(), 0o660);
    for path in bits(root.path()).keys() {
        let metadata = path.symlink_metadata().unwrap();
        assert_eq!(metadata.gid(), group, "{}", path.display());
    }
}

/// Replaces something by a link to a copy of it outside, then stores, loads and looks up. Returns
/// how many of the two chunks were found, loaded and stored.
fn with_link_at(below: &str) -> (usize, usize, usize) {
    let root = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let path = root.path().join("kv");
    let open_store = || Store::open(&config(&path), namespace(), OpenOptions::default());
    let stored = {
        let store = open_store().unwrap();
        let cache = Cache::attach(&store, 0, Geometry::default());
        (0..4).for_each(|block| cache.fill(block, block as u64));
        cache.store(&[(0, vec![0, 1]), (1, vec![2, 3])]).stored
    };
    assert_eq!(stored, 2);
    let inside = path.join(namespace().directory_name());
    // Joining nothing would end it with a slash, which is what lies behind a link.
    let victim = if below.is_empty() {
        inside
    } else {
        inside.join(below)
    };
    let copy = outside.path().join("copy");
    std::fs::rename(&victim, &copy).unwrap();
    symlink(&copy, &victim).unwrap();
    let before = bits(outside.path());
    let outcome = match open_store() {
        Ok(store) => {
            let cache = Cache::attach(&store, 0, Geometry::default());
            let found = store.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap();
            let loaded = cache.load(&[(0, 0, vec![8, 9])]).loaded;
            let stored = cache.store(&[(0, vec![0, 1]), (7, vec![4, 5])]).stored;
            (found, loaded, stored)
        }
        Err(error) => {
            println!("{below}: {error}");
            (0, 0, 0)
        }
    };
    assert_eq!(bits(outside.path()), before, "nothing outside was touched");
    outcome
}

#[test]
fn no_link_below_the_path_leads_anywhere() {
    let chunk = chunk_path(Path::new(""), 0, 0);
    let chunk: PathBuf = chunk.iter().skip(1).collect();
    let folder = chunk.parent().unwrap();
    // A rank's folder or a fan-out folder that is a link is one without chunks, and takes none.
    let (found, loaded, stored) = with_link_at("g0r0");
    assert_eq!((found, loaded, stored), (0, 0, 0));
    let (found, loaded, stored) = with_link_at(folder.to_str().unwrap());
    assert_eq!((found, loaded, stored), (0, 0, 1));
    // A chunk that is a link is bad, goes aside, and its key is free again.
    let (found, loaded, stored) = with_link_at(chunk.to_str().unwrap());
    assert_eq!((found, loaded, stored), (1, 0, 2));
    // What a store needs for itself, as a link, is an error at the start.
    for own in ["tmp", "manifest.json", ""] {
        assert_eq!(with_link_at(own), (0, 0, 0), "{own:?}");
    }
}

#[test]
fn tools_follow_no_link_either() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&root.path().join("kv"));
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(0, vec![0, 1])]);
    let inside = root.path().join("kv").join(namespace().directory_name());
    let outside = root.path().join("outside");
    std::fs::rename(&inside, &outside).unwrap();
    symlink(&outside, &inside).unwrap();
    assert_eq!(inspect::namespaces(&root.path().join("kv")).unwrap(), []);
    assert!(inspect::chunks(&inside).all(|chunk| chunk.is_err()));
    std::fs::remove_file(&inside).unwrap();
    std::fs::rename(&outside, &inside).unwrap();
    std::fs::rename(inside.join("g0r0"), &outside).unwrap();
    symlink(&outside, inside.join("g0r0")).unwrap();
    assert_eq!(inspect::chunks(&inside).count(), 0);
}

/// What separates tenants is vLLM's block hash, which the salt is part of, and it is the key.
#[test]
fn what_one_key_stored_no_other_key_finds() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(1, vec![0, 1])]);
    let others: Vec<_> = (2..200).map(key).collect();
    for other in others {
        assert_eq!(store.lookup(0, &[0], vec![other]).wait(LIMIT).unwrap(), 0);
    }
    assert_eq!(cache.load(&[(2, 0, vec![2, 3])]).failed, [0]);
    // Nor does the same key under another parent: it is checked with the head.
    std::fs::create_dir_all(chunk_path(root.path(), 0, 5).parent().unwrap()).unwrap();
    std::fs::copy(chunk_path(root.path(), 0, 1), chunk_path(root.path(), 0, 5)).unwrap();
    assert_eq!(cache.load(&[(5, 0, vec![2, 3])]).failed, [0]);
}

/// A read-only mount with a bad chunk: read once, then a miss at no cost, until it is replaced.
#[test]
fn a_bad_chunk_that_cannot_be_moved_is_not_read_twice() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
    let root = tempfile::tempdir().unwrap();
    if mount(
        "tmpfs",
        root.path(),
        "tmpfs",
        MountFlags::empty(),
        c"size=8m",
    )
    .is_err()
    {
        eprintln!("skipped: a mount needs root");
        return;
    }
    let store = open(root.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(0, vec![0, 1])]);
    let chunk = chunk_path(root.path(), 0, 0);
    let mut bytes = std::fs::read(&chunk).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&chunk, &bytes).unwrap();
    // Refused for as long as anybody writes, as the janitor does now and then.
    wait_until("read-only", || {
        mount_remount(root.path(), MountFlags::RDONLY, c"").is_ok()
    });
    let load = || cache.load(&[(0, 0, vec![2, 3])]).errors[0].clone();
    let lookup = || store.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap();
    assert_eq!(lookup(), 1);
    assert!(load().contains("does not match"), "found bad by reading it");
    for _ in 0..3 {
        assert_eq!(lookup(), 0, "no lookup counts it any more");
        let error = load();
        assert!(error.contains("not read again"), "{error}");
    }
    mount_remount(root.path(), MountFlags::empty(), c"").unwrap();
    // Its name and length are right; that it is bad is why it can be stored again.
    let again = Store::open(&config(root.path()), namespace(), OpenOptions::default()).unwrap();
    drop(again);
    let report = cache.store(&[(0, vec![0, 1])]);
    assert_eq!(report.stored, 1, "{report:?}");
    assert_eq!(lookup(), 1);
    assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).loaded, 1);
    drop(cache);
    drop(store);
    unmount(root.path(), UnmountFlags::DETACH).unwrap();
}
