//! What the tests of the store show with `posix`, they show with `uring`: here they are once more.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::duplicate_mod,
    reason = "a test that meets an error has failed; each repeated file has its own helpers"
)]

mod common;
#[path = "crash.rs"]
mod crash;
#[path = "damage.rs"]
mod damage;
#[path = "faults.rs"]
mod faults;
#[path = "page_cache.rs"]
mod page_cache;
#[path = "round_trip.rs"]
mod round_trip;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Cache, Geometry, LIMIT, config, engine, key, namespace, open};
use kvrail::config::EngineChoice;
use kvrail::io::UringEngine;
use kvrail::{Access, OpenOptions, Store};

/// Opens a store, or says why this machine cannot run a test of io_uring.
fn has_uring() -> bool {
    let made = UringEngine::new(1, Arc::new(|| ()));
    made.inspect_err(|error| eprintln!("skipped: {error}"))
        .is_ok()
}

#[test]
fn the_engine_is_the_one_that_was_asked_for() {
    assert_eq!(engine(), EngineChoice::Uring);
    if !has_uring() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let report = store.describe().remove(0);
    assert_eq!(
        (report.engine, report.engine_reason.as_str()),
        ("uring", "io_engine is uring")
    );
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.fill(0, 1);
    cache.fill(1, 2);
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).loaded, 1);
    assert_eq!(cache.block(2), cache.block(0));
    assert_eq!(store.metrics().uring_requests_held, 0);
    assert_eq!(store.take_notices(), []);
}

#[test]
fn auto_measures_once_for_each_file_system_when_the_store_is_open() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.io_engine = EngineChoice::Auto;
    let open = |options| {
        let begin = Instant::now();
        let store = Store::open(&config, namespace(), options).unwrap();
        let first = store.describe().remove(0);
        store.wait_for_engines(LIMIT).unwrap();
        (first, begin.elapsed(), store)
    };
    let read_only = OpenOptions {
        access: Access::ReadOnly,
        ..OpenOptions::default()
    };
    let (unmeasured, ..) = open(read_only.clone());
    assert_eq!(unmeasured.engine, "posix");
    let (first, took, store) = open(OpenOptions::default());
    // It starts with posix, unless the comparison was quicker than we were.
    if first.engine_reason.contains("meanwhile") {
        assert_eq!(first.engine, "posix");
    }
    let first = store.describe().remove(0);
    println!("{}: {} in {took:?}", first.engine, first.engine_reason);
    assert!(["posix", "uring"].contains(&first.engine));
    assert!(!first.engine_reason.contains("meanwhile"));
    // 200 ms by design, plus what a busy machine does to the last round.
    assert!(took < Duration::from_secs(10), "{took:?}");
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    let found = store.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap();
    assert_eq!(found, 1);
    if first.engine_reason.contains("rounds") && !first.engine_reason.contains("too slow") {
        let (second, ..) = open(OpenOptions::default());
        assert_eq!(second.engine_reason, first.engine_reason, "measured again");
        // Who only reads does so through the page cache: the same where that was compared.
        let (reader, ..) = open(read_only);
        match first.direct {
            true => assert!(reader.engine_reason.contains("nothing is written")),
            false => assert_eq!(reader.engine_reason, first.engine_reason),
        }
    }
    drop(store);
    let below = directory
        .path()
        .join(namespace().directory_name())
        .join("tmp");
    assert_eq!(
        std::fs::read_dir(below).unwrap().count(),
        0,
        "a file is left"
    );
}
