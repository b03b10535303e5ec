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
