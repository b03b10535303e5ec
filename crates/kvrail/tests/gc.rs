//! What `kvrail gc` does to a store.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "common/files.rs"]
mod files;

use std::time::Duration;

use files::{CHUNK_BYTES, Files};
use kvrail::store::capacity::{CollectOptions, EvictionReason, collect, evictions};

#[test]
fn a_request_removes_what_it_names_and_says_what() {
    let files = Files::new();
    (0..1000).for_each(|index| files.add(index, Duration::from_secs(60 * index), 0));
    let options = CollectOptions {
        older_than: Some(Duration::from_secs(60 * 799 + 30)),
        to_bytes: Some(500 * CHUNK_BYTES),
        dry_run: true,
        ..CollectOptions::default()
    };
    let before = collect(files.root(), &options).unwrap();
    assert_eq!(files.bytes(), 1000 * CHUNK_BYTES);
    assert!(
        !files.root().join(".kvrail").exists(),
        "a dry run leaves nothing"
    );
    let options = CollectOptions {
        dry_run: false,
        ..options
    };
    let done = collect(files.root(), &options).unwrap();
    assert_eq!((done.found.chunks, done.left.chunks), (1000, 500));
    assert_eq!(
        (done.removed_for_age.chunks, done.removed_for_size.chunks),
        (200, 300)
    );
    assert_eq!(before.removed_for_age, done.removed_for_age);
    assert_eq!(before.removed_for_size, done.removed_for_size);
    assert!((0..500).all(|index| files.has(index)) && files.bytes() == done.left.bytes);
    assert_eq!(files.used(), files.bytes());
    assert!(evictions(&files.namespace()).all(|line| line.reason == EvictionReason::Request));
    let folders = std::fs::read_dir(files.namespace().join("g0r0"))
        .unwrap()
        .count();
    assert!(done.folders_removed > 0 && folders <= 500, "{folders}");

    let only = |namespace: &str| CollectOptions {
        namespace: Some(namespace.into()),
        to_bytes: Some(0),
        ..CollectOptions::default()
    };
    assert!(collect(files.root(), &only("n-0123456789abcdef")).is_err());
    assert!(collect(&files.namespace(), &CollectOptions::default()).is_err());
    let done = collect(files.root(), &only("m-0123456789abcdef")).unwrap();
    assert_eq!((done.left.chunks, files.bytes()), (0, 0));
}
