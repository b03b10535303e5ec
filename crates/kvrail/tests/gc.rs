//! What `kvrail gc` does to a store: on its own, and while a janitor counts.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "common/files.rs"]
mod files;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use files::{CHUNK_BYTES, Files, settings};
use kvrail::io::{Observer, Step};
use kvrail::store::capacity::{CollectOptions, EvictionReason, Janitor, collect, evictions};

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

#[test]
fn a_janitor_that_counts_meanwhile_takes_no_removal_off_twice() {
    let files = Files::new();
    (0..1000).for_each(|index| files.add(index, Duration::from_secs(60 * index), 0));
    let mut janitor = Janitor::open(files.root(), settings(u64::MAX / 2)).unwrap();
    let mut passes = 0;
    while passes < 2 {
        passes += janitor.tick().unwrap().passes;
    }
    let janitor = Mutex::new((janitor, 0));
    let removed = AtomicU64::new(0);
    let observer = Observer::new(move |step| {
        let is_chunk = matches!(step, Step::Remove(path) if path.extension().is_some());
        // Passes begin and end between removals, and removals come in the middle of passes.
        if is_chunk && removed.fetch_add(1, Ordering::Relaxed).is_multiple_of(4) {
            let (janitor, passes) = &mut *janitor.lock().unwrap();
            *passes += janitor.tick().unwrap().passes;
        }
    });
    // With a namespace, the request itself corrects nothing.
    let options = CollectOptions {
        namespace: Some("m-0123456789abcdef".into()),
        to_bytes: Some(500 * CHUNK_BYTES),
        observer: Some(observer),
        ..CollectOptions::default()
    };
    let done = collect(files.root(), &options).unwrap();
    assert_eq!((done.left.chunks, done.account_corrected_bytes), (500, 0));
    assert_eq!(files.bytes(), 500 * CHUNK_BYTES);
    let off = files.used().abs_diff(files.bytes());
    assert!(off <= files.bytes() / 100, "{off} bytes off");
}
