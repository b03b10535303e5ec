//! Lookups on a file system that is a round trip away, and those that need none.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::path::Path;
use std::time::{Duration, Instant};

use common::mount;
use kvrail::Store;
use kvrail::config::StoreConfig;
use store::{Cache, Geometry, LIMIT, config, key, open, open_as};

const CHUNKS: u64 = 256;
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// Chunks of which number `missing` is not there.
fn fill(path: &Path, missing: u64) {
    let store = open(path);
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in (0..CHUNKS).filter(|index| *index != missing) {
        assert_eq!(cache.store_alone(index).stored, 1);
    }
    store.close(LIMIT).unwrap();
}

fn open_holding(path: &Path, seconds: f64) -> Store {
    open_as(&StoreConfig {
        lookup_hold_seconds: seconds,
        ..config(path)
    })
}

fn look_up(store: &Store) -> (usize, Duration) {
    let start = Instant::now();
    let found = store.lookup(0, &[0], (0..CHUNKS).map(key).collect());
    let found = found.wait(LIMIT).unwrap();
    (found, start.elapsed())
}

#[test]
fn hundreds_of_chunks_cost_a_handful_of_round_trips() {
    let Some(mounted) = mount(51) else {
        return;
    };
    let missing = CHUNKS - 3;
    fill(mounted.source(), missing);
    let store = open_holding(mounted.path(), 100.0);
    mounted.set("lookup *.safetensors delay=20ms");
    let (found, took) = look_up(&store);
    println!("{found} of {CHUNKS} in {took:.2?}, a round trip takes {ROUND_TRIP:?}");
    assert_eq!(found as u64, missing);
    let one_by_one = ROUND_TRIP * u32::try_from(CHUNKS).unwrap();
    assert!(took < one_by_one / 8, "{took:?}, one by one {one_by_one:?}");
    // The chunks, and no more of those behind the missing one than there are.
    let asked = mounted.hits();
    assert!(asked >= missing && asked <= CHUNKS, "{asked}");

    // Known now, but for the missing one, and those behind it.
    let (found, took) = look_up(&store);
    assert_eq!(found as u64, missing);
    println!("again in {took:.2?}");
    assert!(mounted.hits() - asked <= CHUNKS - missing, "asked again");
    let known = store.metrics().lookup_chunks_known;
    assert_eq!(known, missing);
    store.close(LIMIT).unwrap();
}

#[test]
fn a_path_that_is_out_has_nothing_whatever_was_known() {
    let Some(mounted) = mount(52) else {
        return;
    };
    fill(mounted.source(), CHUNKS);
    let store = open_as(&StoreConfig {
        lookup_hold_seconds: 1000.0,
        lookup_limit_seconds: 0.5,
        ..config(mounted.path())
    });
    assert_eq!(look_up(&store).0 as u64, CHUNKS);
    mounted.set("lookup * hang");
    // What is not known is asked for, and takes the path out.
    let unknown = store.lookup(0, &[0], vec![key(CHUNKS + 1)]);
    assert_eq!(unknown.wait(LIMIT).unwrap(), 0);
    assert_eq!(store.metrics().paths_taken_out, 1);
    assert_eq!(look_up(&store).0, 0);
    mounted.heal();
    store.close(LIMIT).unwrap();
}

#[test]
fn what_failed_to_load_is_not_known_to_be_there() {
    let Some(mounted) = mount(53) else {
        return;
    };
    fill(mounted.source(), CHUNKS);
    let store = open_holding(mounted.path(), 1000.0);
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(look_up(&store).0 as u64, CHUNKS);
    std::fs::remove_file(store::chunk_path(mounted.source(), 0, 7)).unwrap();
    assert_eq!(look_up(&store).0 as u64, CHUNKS, "believed for a while");
    assert_eq!(cache.load(&[(7, 0, vec![2, 3])]).loaded, 0);
    assert_eq!(look_up(&store).0, 7);
    assert_eq!(cache.store_alone(7).stored, 1);
    assert_eq!(look_up(&store).0 as u64, CHUNKS);
    store.close(LIMIT).unwrap();
}
