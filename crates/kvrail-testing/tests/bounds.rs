//! The queues of loads and lookups at their bounds: what is within waits and is served, what is beyond
//! ends at once, counted.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::mount;
use kvrail::{LoadChunk, OpenOptions, Store};
use kvrail_testing::{FaultEngine, fresh_seed};
use store::{Cache, Geometry, LIMIT, chunk, config, key, namespace, open_with};

/// What ARCHITECTURE.md says of the queues.
const LOADS_MAX: usize = 65_536;
const LOOKUPS_MAX: usize = 16_384;
const BEYOND: usize = 10;
/// A job that hangs shall not be given up before the queue is full.
const LIMIT_SECONDS: f64 = 300.0;

fn wait_until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn as_many_loads_wait_as_the_queue_is_long_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let engine = FaultEngine::new(fresh_seed());
    let mut config = config(directory.path());
    config.disk_io_threads = 1;
    config.wait_limit_seconds = LIMIT_SECONDS;
    let store = open_with(&config, Arc::<FaultEngine>::clone(&engine));
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    let load = |index| LoadChunk {
        chunk: chunk(index),
        first_block: 0,
        blocks: vec![2, 3],
    };
    engine.set("read *.safetensors hang");
    let running = cache.kv_cache.load(vec![load(0)]).unwrap();
    wait_until("the load does not hang", || engine.hits() == 1);
    // One long prompt that nobody has: each chunk costs one system call when its turn comes.
    let missing = (1..=LOADS_MAX as u64).map(load).collect();
    let waiting = cache.kv_cache.load(missing).unwrap();
    assert_eq!(waiting.poll(), None);
    assert_eq!(store.metrics().loads_failed, 0, "all have room");
    let beyond = cache
        .kv_cache
        .load((0..BEYOND as u64).map(load).collect())
        .unwrap();
    let report = beyond.poll().unwrap();
    assert_eq!(report.failed.len(), BEYOND);
    assert!(report.errors[0].contains("full"), "{}", report.errors[0]);
    assert_eq!(store.metrics().loads_failed, BEYOND as u64);
    engine.set("");
    assert_eq!(running.wait(LIMIT).unwrap().loaded, 1);
    assert_eq!(waiting.wait(LIMIT).unwrap().failed.len(), LOADS_MAX);
    assert_eq!(store.metrics().chunks_missing, LOADS_MAX as u64);
    // There is room again.
    let again = cache.kv_cache.load(vec![load(0)]).unwrap();
    assert_eq!(again.wait(LIMIT).unwrap().loaded, 1);
}

#[test]
fn as_many_lookups_wait_as_the_queue_is_long_and_no_more() {
    let Some(mounted) = mount(fresh_seed()) else {
        return;
    };
    let mut config = config(mounted.path());
    config.disk_io_threads = 1;
    config.wait_limit_seconds = LIMIT_SECONDS;
    config.lookup_limit_seconds = LIMIT_SECONDS;
    config.slow_limit_seconds = LIMIT_SECONDS;
    let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    let lookup = || store.lookup(0, &[0], vec![key(0)]);
    assert_eq!(lookup().wait(LIMIT).unwrap(), 1);
    let before = mounted.hits();
    mounted.set("lookup,getattr,open,opendir * hang");
    let running = lookup();
    wait_until("the lookup does not hang", || mounted.hits() > before);
    let waiting: Vec<_> = (0..LOOKUPS_MAX).map(|_| lookup()).collect();
    assert!(waiting.iter().all(|ticket| ticket.poll().is_none()));
    for _ in 0..BEYOND {
        assert_eq!(lookup().poll(), Some(0), "no room: nothing there");
    }
    mounted.heal();
    assert_eq!(running.wait(LIMIT).unwrap(), 1);
    for ticket in waiting {
        assert_eq!(ticket.wait(LIMIT).unwrap(), 1);
    }
    assert_eq!(lookup().wait(LIMIT).unwrap(), 1);
}
