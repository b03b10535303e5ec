//! Free space that is left to others, on a small file system of its own.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::io::Write;

use common::small_file_system::SmallFileSystem;
use common::{Cache, Geometry, LIMIT, chunk_bytes, chunk_path, config, open_as, wait_until};
use kvrail::config::{MinFree, StoreConfig};
use kvrail::store::capacity::usage;

#[test]
fn chunks_make_way_for_what_others_put_on_the_file_system() {
    let Some(small) = SmallFileSystem::mount(40) else {
        return;
    };
    let path = small.path().join("kv");
    let settings = StoreConfig {
        min_free: MinFree::Share(0.25),
        ..config(&path)
    };
    let store = open_as(&settings);
    let cache = Cache::attach(&store, 0, Geometry::default());
    let free = || {
        let found = rustix::fs::statvfs(small.path()).unwrap();
        found.f_bavail * found.f_frsize
    };
    let reserve = 10 << 20;
    // Twice as much as fits.
    let mut lowest = u64::MAX;
    for index in 0..3000 {
        cache.store_alone(index);
        lowest = lowest.min(free());
    }
    let metrics = store.metrics();
    println!("{metrics:?}, at least {lowest} bytes were free");
    assert!(metrics.chunks_stored > 1400, "{}", metrics.chunks_stored);
    // A measured free space holds for a second, in which little of this size is stored.
    assert!(lowest >= reserve - (4 << 20), "{lowest}");
    wait_until("eviction for space", || {
        store.metrics().chunks_evicted_space > 0 && free() > reserve
    });
    // Somebody else takes 16 MiB, more than is free at any moment, each piece as soon as it fits.
    let mut theirs = std::fs::File::create(small.path().join("theirs")).unwrap();
    for _ in 0..16 {
        wait_until("room for a piece", || free() > 2 << 20);
        theirs.write_all(&vec![1; 1 << 20]).unwrap();
    }
    wait_until("room for the others", || free() > reserve);
    wait_until("stores", || {
        cache.store_alone(100_000).stored == 1 || chunk_path(&path, 0, 100_000).exists()
    });
    store.close(LIMIT).unwrap();
    let found = chunk_bytes(&path);
    assert!(usage(&path).unwrap().bytes.unwrap().abs_diff(found) <= found / 100);
}

#[test]
fn a_store_that_is_opened_on_a_full_disk_makes_room_and_stores() {
    let Some(small) = SmallFileSystem::mount(40) else {
        return;
    };
    let path = small.path().join("kv");
    let before = open_as(&config(&path));
    let cache = Cache::attach(&before, 0, Geometry::default());
    for index in 0..300 {
        assert_eq!(cache.store_alone(index).stored, 1);
    }
    drop(cache);
    before.close(LIMIT).unwrap();
    drop(before);
    // All that is left is somebody else's, in ever smaller pieces.
    let mut theirs = std::fs::File::create(small.path().join("theirs")).unwrap();
    for size in [1 << 20, 4096, 1] {
        while theirs.write_all(&vec![1; size]).is_ok() {}
    }
    let settings = StoreConfig {
        min_free: MinFree::Share(0.05),
        ..config(&path)
    };
    let store = open_as(&settings);
    let said = store.take_notices();
    let is_said = said
        .iter()
        .any(|notice| notice.message.contains("no space left"));
    println!("{said:?}");
    let cache = Cache::attach(&store, 0, Geometry::default());
    wait_until("eviction for space", || {
        store.metrics().chunks_evicted_space > 0
    });
    wait_until("stores", || {
        cache.store(&[(1000, vec![0, 1])]).stored == 1 || chunk_path(&path, 0, 1000).exists()
    });
    let report = cache.load(&[(1000, 0, vec![0, 1])]);
    assert_eq!(report.loaded, 1, "{report:?}, {:?}", store.metrics());
    assert!(is_said, "the disk was not full");
    store.close(LIMIT).unwrap();
}
