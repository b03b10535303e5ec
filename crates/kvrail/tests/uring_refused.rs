//! Machines that do not give io_uring, or not all of it: the store works, and says what it is without.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use common::{Cache, Geometry, LIMIT, config, namespace};
use kvrail::config::EngineChoice;
use kvrail::io::UringEngine;
use kvrail::store::NoticeLevel;
use kvrail::{OpenOptions, Store};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use seccompiler::{SeccompAction, SeccompFilter, apply_filter};

/// `io_uring_setup`, the same number on every architecture.
const IO_URING_SETUP: i64 = 425;

/// Makes `io_uring_setup` fail for this thread, and those that it starts, as in a container.
fn forbid_io_uring(errno: rustix::io::Errno) {
    let filter = SeccompFilter::new(
        BTreeMap::from([(IO_URING_SETUP, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.raw_os_error().unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

fn works(store: &Store) {
    let cache = Cache::attach(store, 0, Geometry::default());
    cache.fill(0, 1);
    cache.fill(1, 2);
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).loaded, 1);
    assert_eq!(cache.block(3), cache.block(1));
}

#[test]
fn where_a_seccomp_filter_forbids_io_uring_posix_moves_the_bytes_and_it_is_said() {
    for (errno, words) in [
        (
            rustix::io::Errno::PERM,
            "forbidden, by kernel.io_uring_disabled",
        ),
        (rustix::io::Errno::NOSYS, "this kernel has no io_uring"),
    ] {
        let thread = std::thread::spawn(move || {
            forbid_io_uring(errno);
            for wish in [EngineChoice::Uring, EngineChoice::Auto] {
                let directory = tempfile::tempdir().unwrap();
                let mut config = config(directory.path());
                config.io_engine = wish;
                let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
                store.wait_for_engines(LIMIT).unwrap();
                let report = store.describe().remove(0);
                assert_eq!(report.engine, "posix");
                assert!(
                    report.engine_reason.contains(words),
                    "{}",
                    report.engine_reason
                );
                works(&store);
                let notices = store.take_notices();
                // Whoever asked for it is told; who left the choice is not bothered.
                let warned = notices.iter().filter(|n| n.level == NoticeLevel::Warning);
                let expected = usize::from(wish == EngineChoice::Uring);
                assert_eq!(warned.count(), expected, "{notices:?}");
                if let Some(notice) = notices.first() {
                    assert!(notice.message.contains(words), "{}", notice.message);
                }
            }
        });
        thread.join().unwrap();
    }
}

#[test]
fn where_memory_must_not_be_locked_uring_goes_on_without_registered_buffers() {
    if let Err(error) = UringEngine::new(1, Arc::new(|| ())) {
        eprintln!("skipped: {error}");
        return;
    }
    let before = getrlimit(Resource::Memlock);
    let low = Rlimit {
        current: Some(64 << 10),
        ..before
    };
    setrlimit(Resource::Memlock, low).unwrap();
    let thread = std::thread::spawn(|| {
        // Root may lock what it likes, unless it is told not to.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        config.io_engine = EngineChoice::Uring;
        let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
        works(&store);
        assert_eq!(store.describe()[0].engine, "uring");
        // It is tried on a thread of its own.
        let end = Instant::now() + LIMIT;
        let notices = loop {
            let notices = store.take_notices();
            if !notices.is_empty() {
                break notices;
            }
            assert!(Instant::now() < end, "nothing was said");
            std::thread::yield_now();
        };
        assert_eq!(notices.len(), 1, "{notices:?}");
        let message = &notices[0].message;
        assert!(
            message.contains("without registered buffers (1 MiB"),
            "{message}"
        );
        assert!(message.contains("ulimit -l"), "{message}");
    });
    let result = thread.join();
    setrlimit(Resource::Memlock, before).unwrap();
    result.unwrap();
}
