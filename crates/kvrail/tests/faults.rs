//! An engine that fails: nothing partial becomes visible, nothing wrong is served, nothing hangs.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Cache, Geometry, chunk_files, config, fault_engine, names, open_with};
use kvrail::io::{IoEngine, IoHandle, IoRequest};
use kvrail::{Error, ErrorKind};

/// The writes of chunks, not those of the probe.
const CHUNK_WRITES: &str = "write */tmp/.chunk.*";
/// The reads of chunks.
const CHUNK_READS: &str = "read *.safetensors";

#[test]
fn failed_writes_leave_no_file_and_their_keys_free() {
    for fault in ["error=EIO", "lie", "short", "error=ENOSPC", "error=EDQUOT"] {
        let directory = tempfile::tempdir().unwrap();
        let engine = fault_engine(1);
        engine.set(&format!("{CHUNK_WRITES} {fault} every=3"));
        let store = open_with(&config(directory.path()), engine);
        let cache = Cache::attach(&store, 0, Geometry::default());
        let chunks: Vec<_> = (0..9).map(|index| (index, vec![0, 1])).collect();
        let reports: Vec<_> = chunks.chunks(1).map(|chunk| cache.store(chunk)).collect();
        let stored = reports.iter().map(|report| report.stored).sum::<usize>();
        let metrics = store.metrics();
        assert_eq!(chunk_files(directory.path()).len(), stored, "{fault}");
        assert!(
            names(directory.path(), "tmp").is_empty(),
            "{fault}: no temp file is left"
        );
        if ["error=ENOSPC", "error=EDQUOT"].contains(&fault) {
            // The first failure makes the path rest, so that a full disk is not hammered.
            assert_eq!((stored, metrics.stores_dropped_no_space), (0, 9));
        } else {
            assert_eq!((stored, metrics.stores_failed), (6, 3), "{fault}");
            let again = (0..2).any(|_| cache.store(&chunks[..1]).stored == 1);
            assert!(
                again,
                "{fault}: one of two tries is not failed by the engine"
            );
        }
        assert_eq!(
            store.take_notices().len(),
            1,
            "{fault}: one line for all of it"
        );
    }
}

#[test]
fn failed_and_lying_reads_are_misses() {
    for fault in ["error=EIO", "lie", "short", "flip", "zero", "swap"] {
        let directory = tempfile::tempdir().unwrap();
        let engine = fault_engine(2);
        engine.set(&format!("{CHUNK_READS} {fault} every=2"));
        let store = open_with(&config(directory.path()), engine);
        let cache = Cache::attach(&store, 0, Geometry::default());
        (0..8).for_each(|block| cache.fill(block, block as u64));
        for index in 0..4_u64 {
            let first = 2 * index as usize;
            assert_eq!(cache.store(&[(index, vec![first, first + 1])]).stored, 1);
        }
        for index in 0..4_usize {
            let report = cache.load(&[(index as u64, 0, vec![40, 41])]);
            if report.loaded == 1 {
                assert_eq!(cache.block(40), cache.block(2 * index), "{fault}");
            }
        }
        assert_eq!(store.metrics().loads_failed, 2, "{fault}");
        let damaged = if fault == "error=EIO" { 0 } else { 2 };
        assert_eq!(
            store.metrics().chunks_damaged,
            damaged,
            "an I/O error is no damage"
        );
        assert_eq!(chunk_files(directory.path()).len(), 4 - damaged as usize);
    }
}

#[test]
fn a_request_that_hangs_costs_the_wait_limit_and_keeps_its_memory() {
    for operation in [CHUNK_READS, CHUNK_WRITES] {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        config.wait_limit_seconds = 0.3;
        let engine = fault_engine(3);
        engine.set(&format!("{operation} hang"));
        let store = open_with(&config, Arc::clone(&engine) as Arc<dyn IoEngine>);
        let cache = Cache::attach(&store, 0, Geometry::default());
        let start = Instant::now();
        let stored = cache.store(&[(0, vec![0, 1])]).stored;
        if operation == CHUNK_WRITES {
            assert_eq!(stored, 0);
        } else {
            assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).failed, [0]);
        }
        let waited = start.elapsed();
        assert!(waited >= Duration::from_millis(290), "{waited:?}");
        assert!(waited < Duration::from_secs(20), "{waited:?}");
        assert_eq!(engine.hits(), 1);
        // The buffer belongs to the request until the engine lets it go, which nobody waits for.
        engine.set("");
        assert!(chunk_files(directory.path()).len() <= 1);
    }
}

#[test]
fn an_engine_that_refuses_everything_makes_opening_fail_with_the_cause() {
    #[derive(Debug)]
    struct Refusing;
    impl IoEngine for Refusing {
        fn name(&self) -> &'static str {
            "refusing"
        }
        fn submit(&self, _request: IoRequest) -> IoHandle {
            let (completion, handle) = IoHandle::pair();
            completion.complete(Err(Error::new(ErrorKind::Io, "no I/O today")));
            handle
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let opened = kvrail::Store::open_with_engine(
        &config(directory.path()),
        common::namespace(),
        kvrail::OpenOptions::default(),
        Arc::new(Refusing),
    );
    assert!(opened.unwrap_err().to_string().contains("no I/O today"));
}
