//! When a second engine is taken, and when not.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::super::{FolderRules, IoHandle, IoRequest, Operation, PosixEngine};
use super::*;
use crate::error::ErrorKind;

fn folder(directory: &tempfile::TempDir) -> Folder {
    Folder::open(directory.path(), FolderRules::default()).unwrap()
}

fn always() -> bool {
    true
}

fn posix() -> PosixEngine {
    PosixEngine::new(2, Arc::new(|| ())).unwrap()
}

/// An engine that takes its time, or gives back what it likes.
#[derive(Debug)]
struct Odd {
    inner: PosixEngine,
    pause: Duration,
    lies: bool,
}

impl IoEngine for Odd {
    fn name(&self) -> &'static str {
        "odd"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        thread::sleep(self.pause);
        if self.lies && request.operation == Operation::Read {
            let (completion, handle) = IoHandle::pair();
            completion.complete(Ok(request.buffer));
            return handle;
        }
        self.inner.submit(request)
    }
}

fn odd(pause_ms: u64, lies: bool) -> Odd {
    Odd {
        inner: posix(),
        pause: Duration::from_millis(pause_ms),
        lies,
    }
}

#[test]
fn the_second_is_taken_only_when_it_is_better_by_more_than_chance() {
    let better = |ratios: &[f64]| {
        let found = Comparison::of(ratios.to_vec(), ["posix", "uring"]);
        assert!(!found.reason.is_empty());
        found.second_is_better
    };
    assert!(better(&[1.2, 1.1, 1.3, 0.9, 1.2]));
    assert!(!better(&[1.2, 0.9, 1.3, 0.9, 1.2]), "two rounds were lost");
    assert!(!better(&[1.04, 1.04, 1.04, 1.04, 1.04]), "too little");
    assert!(!better(&[2.0, 2.0, 2.0, 2.0]), "too few rounds");
    assert!(!better(&[0.5; 9]));
}

#[test]
fn an_engine_that_is_slow_loses_and_nothing_is_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let folder = folder(&directory);
    let found = compare_engines(
        &posix(),
        &odd(3, false),
        &folder,
        ".compare",
        false,
        &always,
    )
    .unwrap();
    assert!(!found.second_is_better, "{found:?}");
    assert!(begin.elapsed() < 10 * BUDGET, "{:?}", begin.elapsed());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_mount_that_is_slow_is_not_measured_for_long() {
    let directory = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let folder = folder(&directory);
    let found = compare_engines(
        &odd(50, false),
        &posix(),
        &folder,
        ".compare",
        false,
        &always,
    )
    .unwrap();
    assert!(
        !found.second_is_better && found.ratios.is_empty(),
        "{found:?}"
    );
    assert!(found.reason.contains("not what it waits for"), "{found:?}");
    assert!(begin.elapsed() < 10 * BUDGET, "{:?}", begin.elapsed());
}

#[test]
fn an_engine_that_lies_is_found_out() {
    let directory = tempfile::tempdir().unwrap();
    let folder = folder(&directory);
    let error =
        compare_engines(&odd(0, true), &posix(), &folder, ".compare", false, &always).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let folder = folder(&directory);
    let name = "missing/file";
    assert!(compare_engines(&posix(), &posix(), &folder, name, false, &always).is_err());
}

#[test]
fn who_does_not_go_on_ends_before_the_next_transfer() {
    let directory = tempfile::tempdir().unwrap();
    let folder = folder(&directory);
    for transfers in [0, 1, 5] {
        let asked = AtomicUsize::new(0);
        let goes_on = || asked.fetch_add(1, Ordering::Relaxed) < transfers;
        let compared = compare_engines(&posix(), &posix(), &folder, ".compare", false, &goes_on);
        assert_eq!(compared.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(asked.load(Ordering::Relaxed), transfers + 1);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
