//! What tools remove is taken off the account as it goes: a janitor that counts meanwhile would find
//! it missing and take it off as well.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "common/files.rs"]
mod files;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{LIMIT, key};
use files::{CHUNK_BYTES, Files, settings};
use kvrail::io::{Observer, Step};
use kvrail::store::capacity::{CollectOptions, Janitor, Removals, collect, usage};

const AGE: Duration = Duration::from_secs(1000);

/// Lets a janitor count all there is.
fn count(files: &Files) -> Janitor {
    let mut janitor = Janitor::open(files.root(), settings(u64::MAX / 2)).unwrap();
    let start = std::time::Instant::now();
    let mut passes = 0;
    while passes < 2 {
        passes += janitor.tick().unwrap().passes;
        assert!(start.elapsed() < LIMIT, "not counted within {LIMIT:?}");
    }
    janitor
}

/// Moves a chunk to the quarantine, as it was long ago.
fn set_aside(files: &Files, index: u64) {
    files.add(index, AGE, 0);
    let quarantine = files.namespace().join("quarantine");
    std::fs::create_dir_all(&quarantine).unwrap();
    let name = format!("{:020}-g0r0-{}.safetensors", index + 1, key(index));
    std::fs::rename(files.path(index), quarantine.join(name)).unwrap();
}

#[test]
fn a_request_tells_of_each_quarantined_chunk_at_once() {
    let files = Files::new();
    let (chunks, aside) = (50, 10);
    (0..chunks).for_each(|index| files.add(index, Duration::ZERO, 0));
    (chunks..chunks + aside).for_each(|index| set_aside(&files, index));
    let janitor = count(&files);
    let all = (chunks + aside) * CHUNK_BYTES;
    assert_eq!(files.used(), all);
    let said: Arc<Mutex<Vec<u64>>> = Arc::default();
    let (seen, root) = (Arc::clone(&said), files.root().to_path_buf());
    let observer = Observer::new(move |step| {
        let Step::Remove(path) = step else { return };
        if path
            .extension()
            .is_some_and(|ending| ending == "safetensors")
        {
            let used = usage(&root).unwrap().bytes.unwrap();
            seen.lock().unwrap().push(used);
        }
    });
    let options = CollectOptions {
        older_than: Some(AGE / 2),
        observer: Some(observer),
        ..CollectOptions::default()
    };
    let collected = collect(files.root(), &options).unwrap();
    assert_eq!(collected.quarantined_removed.chunks, aside);
    // When one has gone, all before it were told of.
    let expected: Vec<u64> = (0..aside).map(|gone| all - gone * CHUNK_BYTES).collect();
    assert_eq!(*said.lock().unwrap(), expected);
    assert_eq!(files.used(), chunks * CHUNK_BYTES);
    janitor.close();
}

#[test]
fn what_goes_while_a_janitor_counts_is_taken_off_once() {
    let files = Files::new();
    let (chunks, removed) = (600, 500);
    (0..chunks).for_each(|index| files.add(index, Duration::ZERO, 0));
    let mut janitor = count(&files);
    let mut removals = Removals::open(files.root()).unwrap();
    let mut passes = 0;
    for index in 0..removed {
        std::fs::remove_file(files.path(index)).unwrap();
        removals.note(CHUNK_BYTES);
        // Slowly, so that passes end in between.
        passes += janitor.tick().unwrap().passes;
        let there = (chunks - index - 1) * CHUNK_BYTES;
        assert!(files.used() >= there, "{} of {there}", files.used());
    }
    removals.end().unwrap();
    println!("{passes} passes meanwhile");
    assert!(passes > 2, "{passes} passes");
    let there = (chunks - removed) * CHUNK_BYTES;
    assert!(files.used() >= there, "{} of {there}", files.used());
    janitor.close();
}
