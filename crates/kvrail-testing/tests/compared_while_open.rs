//! Engines are compared behind a store that is open: nobody waits for it, whatever the mount does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;
#[path = "common/subject.rs"]
mod subject;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Mounted, mount};
use kvrail::config::{EngineChoice, StoreConfig};
use kvrail::io::UringEngine;
use kvrail::{Access, ErrorKind, OpenOptions, Store};
use store::{Cache, Geometry, LIMIT, names, namespace, wait_until};
use subject::{CHUNKS, Subject, limits};

const MEANWHILE: &str = "being compared with uring, posix meanwhile";

/// A faulty mount, where there is another engine to compare with.
fn subject_mount(seed: u64) -> Option<Mounted> {
    if let Err(error) = UringEngine::new(1, Arc::new(|| ())) {
        eprintln!("skipped: {error}");
        return None;
    }
    mount(seed)
}

fn auto(path: &Path) -> StoreConfig {
    StoreConfig {
        io_engine: EngineChoice::Auto,
        ..limits(path)
    }
}

fn engine(store: &Store) -> (&'static str, String) {
    let report = store.describe().remove(0);
    (report.engine, report.engine_reason)
}

#[test]
fn opening_does_not_wait_and_the_store_works_meanwhile() {
    let Some(mounted) = subject_mount(21) else {
        return;
    };
    let mut config = auto(mounted.path());
    config.wait_limit_seconds = 30.0;
    // Nothing but the comparison is held.
    mounted.set("write */.compare.* hang");
    let start = Instant::now();
    let mut subject = Subject::with_limits(&config);
    println!(
        "open, with {CHUNKS} chunks stored, after {:.2?}",
        start.elapsed()
    );
    assert_eq!(engine(&subject.store), ("posix", MEANWHILE.to_owned()));
    assert!(subject.load_chunk(1));
    let error = subject.store.wait_for_engines(Duration::from_millis(50));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::TimedOut);
    // Another store of this process on this file system waits for its turn, and is as usable.
    let other = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
    assert_eq!(engine(&other).1, MEANWHILE);
    let reading = OpenOptions {
        access: Access::ReadOnly,
        ..OpenOptions::default()
    };
    let reader = Store::open(&config, namespace(), reading).unwrap();
    assert_eq!(engine(&reader).1, "not compared where nothing is written");
    reader.wait_for_engines(Duration::ZERO).unwrap();
    mounted.heal();
    subject.store.wait_for_engines(LIMIT).unwrap();
    other.wait_for_engines(LIMIT).unwrap();
    let (name, reason) = engine(&subject.store);
    println!("then {name}: {reason}");
    assert!(!reason.contains("meanwhile"), "{reason}");
    let said: Vec<_> = subject.store.take_notices();
    let decided = said
        .iter()
        .filter(|one| one.message.contains(&format!("{name} moves the bytes")));
    assert_eq!(decided.count(), 1, "{said:?}");
    assert!(subject.load_chunk(2) && subject.store_chunk(100));
    assert_eq!(subject.store.metrics().paths_taken_out, 0);
}

#[test]
fn a_store_that_is_dropped_in_the_middle_leaves_nothing_behind() {
    let Some(mounted) = subject_mount(22) else {
        return;
    };
    let config = auto(mounted.path());
    let left = || names(mounted.source(), "tmp");
    for close in [true, false] {
        // Held until we are through with the store, and it would go on for seconds.
        mounted.set("write,read */.compare.* delay=400ms");
        let before = mounted.hits();
        let subject = Subject::with_limits(&config);
        wait_until("a comparison", || mounted.hits() > before);
        assert_eq!(engine(&subject.store).1, MEANWHILE);
        let start = Instant::now();
        if close {
            subject.store.close(LIMIT).unwrap();
            assert_eq!(left(), [""; 0], "closing waits for it");
        }
        drop(subject);
        println!("dropping took {:.2?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(2));
        let ended = wait_until("the end of the comparison", || left().is_empty());
        println!("its file was gone after {ended:.2?}");
        mounted.heal();
    }
    // One that hangs is left behind, and its file goes when the mount is back.
    mounted.set("write */.compare.* hang");
    let before = mounted.hits();
    let subject = Subject::with_limits(&config);
    wait_until("a comparison", || mounted.hits() > before);
    let start = Instant::now();
    drop(subject);
    assert!(start.elapsed() < Duration::from_secs(1));
    mounted.heal();
    wait_until("the end of the comparison", || left().is_empty());
}

#[test]
fn a_mount_that_hangs_in_the_comparison_is_left_alone_and_comes_back() {
    let Some(mounted) = subject_mount(23) else {
        return;
    };
    drop(Subject::new(mounted.path()));
    for operation in ["create", "write", "read", "unlink"] {
        // The kernel lets nobody else create in a folder meanwhile, so nothing is stored here.
        mounted.set(&format!("{operation} */.compare.* hang"));
        let config = auto(mounted.path());
        let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
        let cache = Cache::attach(&store, 0, Geometry::default());
        let mut subject = Subject {
            store,
            cache,
            longest: [Duration::ZERO; 3],
        };
        let start = Instant::now();
        subject.store.wait_for_engines(LIMIT).unwrap();
        let (name, reason) = engine(&subject.store);
        println!(
            "{operation}: after {:.2?} {name}: {reason}",
            start.elapsed()
        );
        assert_eq!(name, "posix");
        assert!(reason.contains("could not be compared"), "{reason}");
        // A read is given up by the comparison itself, and its file removed. What has no such limit,
        // as removing a file that is being written, takes the path out.
        let is_out = subject.store.metrics().paths_taken_out;
        assert_eq!(is_out, u64::from(operation != "read"), "{operation}");
        mounted.heal();
        subject.wait_until_well();
        assert_eq!(engine(&subject.store).0, "posix");
    }
}

#[test]
fn a_path_that_fails_or_has_no_room_is_not_compared() {
    let Some(mounted) = subject_mount(24) else {
        return;
    };
    mounted.set("create */.compare.* error=EIO");
    let subject = Subject::with_limits(&auto(mounted.path()));
    subject.store.wait_for_engines(LIMIT).unwrap();
    let (name, reason) = engine(&subject.store);
    assert_eq!(name, "posix");
    assert!(reason.contains("could not be compared"), "{reason}");
    mounted.heal();
    // All but the comparison's few megabytes is kept free.
    let space = rustix::fs::statvfs(mounted.path()).unwrap();
    let free = space.f_bavail * space.f_frsize;
    let mut config = auto(mounted.path());
    config.min_free = kvrail::config::MinFree::Bytes(free - (8 << 20));
    let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
    store.wait_for_engines(LIMIT).unwrap();
    let (name, reason) = engine(&store);
    assert_eq!(name, "posix");
    assert!(reason.contains("not compared with uring"), "{reason}");
}
