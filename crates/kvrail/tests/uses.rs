//! When a chunk was last used, as its file says it: renewed by a use, tail before head.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::time::{Duration, SystemTime};

use common::{
    Cache, FILE_BYTES, Geometry, LIMIT, chunk_files, chunk_path, config, open, open_as, wait_until,
};
use kvrail::config::{MinFree, StoreConfig};
use kvrail::store::capacity::{Janitor, JanitorSettings, Stamp};

#[test]
fn a_prefix_loses_its_tail_before_its_head() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(path);
    let cache = Cache::attach(&store, 0, Geometry::default());
    // One prompt of 40 chunks, stored in two calls; then its second half is loaded alone, as when
    // the serving engine has the first half in its own memory.
    let chunks = |range: std::ops::Range<u64>| -> Vec<_> {
        range.map(|index| (index, vec![0, 1])).collect()
    };
    cache.store(&chunks(0..20));
    cache.store(&chunks(20..40));
    let stamp = |index: u64| {
        let metadata = std::fs::metadata(chunk_path(path, 0, index)).unwrap();
        let since = metadata
            .modified()
            .unwrap()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        Stamp::from_time(since.as_secs() as i64, i64::from(since.subsec_nanos()))
    };
    let is_ordered =
        || (0..39).all(|index| stamp(index).milliseconds() > stamp(index + 1).milliseconds());
    // Whatever order the threads worked in.
    assert!(is_ordered());
    store.close(LIMIT).unwrap();
    // Long ago, in the wrong order.
    for index in 0..40 {
        let file = std::fs::File::options()
            .write(true)
            .open(chunk_path(path, 0, index))
            .unwrap();
        let age = Duration::from_secs(4000 - index);
        file.set_modified(SystemTime::now() - age).unwrap();
    }
    // One thread, so that chunks are loaded in order.
    let store = open_as(&StoreConfig {
        disk_io_threads: 1,
        ..config(path)
    });
    let cache = Cache::attach(&store, 0, Geometry::default());
    let load = |range: std::ops::Range<u64>| {
        let chunks: Vec<_> = range.map(|index| (index, 0, vec![0, 1])).collect();
        let report = cache.load(&chunks);
        assert_eq!(report.failed, Vec::<usize>::new(), "{report:?}");
    };
    load(0..40);
    // The files are told when nobody waits for the loads any more.
    wait_until("stamps", || store.metrics().chunks_touched == 40);
    assert!(is_ordered());
    assert!((0..40).all(|index| stamp(index).uses() == 1));
    let touched: Vec<Stamp> = (0..40).map(stamp).collect();
    load(20..40);
    // By the one thread, in order.
    load(0..1);
    assert_eq!(
        store.metrics().chunks_touched,
        40,
        "once in a minute is enough"
    );
    assert!((0..40).all(|index| stamp(index) == touched[index as usize]));
    store.close(LIMIT).unwrap();
    drop(cache);
    drop(store);

    let settings = JanitorSettings {
        max_size: Some(20 * FILE_BYTES),
        min_free: MinFree::Bytes(0),
        ..JanitorSettings::new(&config(path))
    };
    let mut janitor = Janitor::open(path, settings).unwrap();
    wait_until("eviction", || {
        let tick = janitor.tick().unwrap();
        chunk_files(path).len() < 40 && !tick.busy
    });
    assert_eq!(chunk_files(path).len(), 18);
    assert!((0..18).all(|index| chunk_path(path, 0, index).exists()));
}

#[test]
fn using_a_tail_renews_the_head_that_the_engine_had_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open_as(&StoreConfig {
        disk_io_threads: 1,
        ..config(path)
    });
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..10).for_each(|index| {
        cache.store(&[(index, vec![0, 1])]);
    });
    let modified = |index: u64| {
        std::fs::metadata(chunk_path(path, 0, index))
            .unwrap()
            .modified()
            .unwrap()
    };
    // Another host touched nothing for an hour; this process remembers what it stored just now, so
    // nothing is renewed: a file's own time does not matter to it for a minute.
    let before: Vec<_> = (0..10).map(modified).collect();
    cache.store(&[(10, vec![0, 1])]);
    assert!((0..10).all(|index| modified(index) == before[index as usize]));
    assert!(modified(10) < modified(9));
    // A process that knows nothing yet: a new chunk is older than the one before it, as the file says.
    let old = SystemTime::now() - Duration::from_secs(3000);
    let file = std::fs::File::options()
        .write(true)
        .open(chunk_path(path, 0, 10))
        .unwrap();
    file.set_modified(old).unwrap();
    drop(store);
    let store = open(path);
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(11, vec![0, 1])]);
    assert!(modified(11) < old);
}
