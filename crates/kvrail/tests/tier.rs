//! The DRAM tier (`local_cpu`): what it serves, what it keeps, and what it never does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::known::{get, put, remove_file};
use common::{Cache, Geometry, chunk_path, config, namespace, open_with};
use kvrail::config::StoreConfig;
use kvrail::{ErrorKind, OpenOptions, Store};
use kvrail_testing::FaultEngine;

/// Bytes of a chunk file of the default geometry: head, three pages, page table.
const FILE_BYTES: usize = 4096 + 3 * 4096 + 4096;

/// Settings with a tier for so many chunks.
fn with_tier(path: &Path, chunks: usize) -> StoreConfig {
    let mut config = config(path);
    config.local_cpu = true;
    config.max_local_cpu_size_gb = (chunks * FILE_BYTES) as f64 / 1e9;
    config
}

fn open(config: &StoreConfig) -> (Store, Cache) {
    let store = Store::open(config, namespace(), OpenOptions::default()).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    (store, cache)
}

#[test]
fn what_was_stored_is_loaded_without_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = open(&with_tier(folder.path(), 8));
    (0..3).for_each(|index| put(&cache, index));
    (0..3).for_each(|index| remove_file(folder.path(), index));
    assert!((0..3).all(|index| get(&cache, index)));
    // Only the second block, and nothing else is written.
    cache.fill(30, 77);
    let before = cache.block(31);
    assert_eq!(cache.load(&[(2, 1, vec![30])]).loaded, 1);
    cache.fill(40, 5);
    assert_eq!(cache.block(30), cache.block(40));
    assert_eq!(cache.block(31), before);
    let metrics = store.metrics();
    assert_eq!(metrics.chunks_loaded, 4);
    assert_eq!(metrics.local_cpu_chunks_loaded, 4);
    assert_eq!(metrics.local_cpu_bytes_loaded, 3 * 12_000 + 6_000);
    assert_eq!(metrics.local_cpu_bytes, 3 * FILE_BYTES as u64);
}

#[test]
fn what_was_loaded_whole_is_loaded_again_without_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (first, cache) = open(&config(folder.path()));
    (0..2).for_each(|index| put(&cache, index));
    drop((first, cache));
    let (store, cache) = open(&with_tier(folder.path(), 8));
    assert!(get(&cache, 0));
    assert_eq!(cache.load(&[(1, 1, vec![12])]).loaded, 1);
    assert_eq!(store.metrics().local_cpu_chunks_loaded, 0);
    (0..2).for_each(|index| remove_file(folder.path(), index));
    assert!(get(&cache, 0));
    assert!(!get(&cache, 1), "a part of a chunk is not kept");
}

#[test]
fn nothing_is_kept_where_the_tier_is_off_or_smaller_than_a_chunk() {
    for chunks in [None, Some(0)] {
        let folder = tempfile::tempdir().unwrap();
        let settings = chunks.map_or_else(
            || config(folder.path()),
            |chunks| with_tier(folder.path(), chunks),
        );
        let (store, cache) = open(&settings);
        put(&cache, 0);
        remove_file(folder.path(), 0);
        assert!(!get(&cache, 0));
        assert_eq!(store.metrics().local_cpu_bytes, 0);
    }
}

#[test]
fn the_tier_is_bounded_and_takes_no_staging_buffer_from_others() {
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = open(&with_tier(folder.path(), 4));
    let plain = tempfile::tempdir().unwrap();
    let (_, without) = open(&config(plain.path()));
    let buffers = without.kv_cache.staging_buffers();
    assert_eq!(cache.kv_cache.staging_buffers(), buffers);
    for index in 0..100 {
        put(&cache, index);
        assert!(store.metrics().local_cpu_bytes <= 4 * FILE_BYTES as u64);
    }
    assert_eq!(store.metrics().local_cpu_bytes, 4 * FILE_BYTES as u64);
    // More loads at once than there are buffers of both kinds.
    let loads: Vec<_> = (0..27)
        .map(|index| {
            (
                index,
                0,
                vec![10 + 2 * index as usize, 11 + 2 * index as usize],
            )
        })
        .collect();
    assert_eq!(cache.load(&loads).loaded, 27);
    assert!(store.metrics().local_cpu_bytes <= 4 * FILE_BYTES as u64);
    assert_eq!(store.metrics().stores_dropped_no_buffer, 0);
}

#[test]
fn one_pass_over_many_chunks_leaves_those_that_are_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = open(&with_tier(folder.path(), 20));
    (0..10).for_each(|index| put(&cache, index));
    for _ in 0..3 {
        assert!((0..10).all(|index| get(&cache, index)));
    }
    // Ten times what the tier holds, each once.
    (100..300).for_each(|index| put(&cache, index));
    let before = store.metrics().local_cpu_chunks_loaded;
    assert!((0..10).all(|index| get(&cache, index)));
    let kept = store.metrics().local_cpu_chunks_loaded - before;
    println!("{kept} of 10 chunks in use stayed in memory");
    assert!(kept >= 8);
}

#[test]
fn memory_that_went_bad_is_never_served_and_its_file_is_read_instead() {
    let folder = tempfile::tempdir().unwrap();
    let engine = FaultEngine::new(31);
    let store = open_with(&with_tier(folder.path(), 8), Arc::clone(&engine) as _);
    let cache = Cache::attach(&store, 0, Geometry::default());
    put(&cache, 0);
    let good = std::fs::read(chunk_path(folder.path(), 0, 0)).unwrap();
    // The engine changes the buffer while it writes it, so memory and file are bad alike.
    engine.set("write * flip");
    put(&cache, 1);
    engine.set("");
    assert!(get(&cache, 0));
    assert!(!get(&cache, 1), "bad in memory and on disk");
    assert_eq!(store.metrics().chunks_damaged, 2, "once in each place");
    // A good file behind bad memory serves.
    engine.set("write * flip");
    put(&cache, 2);
    engine.set("");
    let (other, writer) = open(&config(folder.path()));
    remove_file(folder.path(), 2);
    put(&writer, 2);
    drop((other, writer));
    assert!(get(&cache, 2));
    let metrics = store.metrics();
    assert_eq!(metrics.local_cpu_chunks_loaded, 1);
    assert_eq!(
        std::fs::read(chunk_path(folder.path(), 0, 0)).unwrap(),
        good
    );
    // It was read whole, so memory is good again.
    remove_file(folder.path(), 2);
    assert!(get(&cache, 2));
}

#[test]
fn loads_of_one_chunk_at_once_share_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = open(&with_tier(folder.path(), 2));
    put(&cache, 0);
    remove_file(folder.path(), 0);
    let loads: Vec<_> = (0..20)
        .map(|index| (0, 0, vec![10 + 2 * index, 11 + 2 * index]))
        .collect();
    assert_eq!(cache.load(&loads).loaded, 20);
    cache.fill(0, 0);
    cache.fill(1, 1);
    for index in 0..20 {
        assert_eq!(cache.block(10 + 2 * index), cache.block(0));
        assert_eq!(cache.block(11 + 2 * index), cache.block(1));
    }
    assert_eq!(store.metrics().local_cpu_chunks_loaded, 20);
}

#[test]
fn more_memory_than_the_machine_has_is_an_error_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config(folder.path());
    settings.max_local_cpu_size_gb = 900_000.0;
    assert!(Store::open(&settings, namespace(), OpenOptions::default()).is_ok());
    settings.local_cpu = true;
    let error = Store::open(&settings, namespace(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    let text = error.to_string();
    let begin = "`max_local_cpu_size` = 900000: expected at most what the machine has (";
    assert!(text.starts_with(begin), "{text}");
}
