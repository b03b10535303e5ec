//! What is stored comes back, block by block, however the store is used.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use common::{
    Cache, Geometry, LIMIT, chunk_files, chunk_path, config, key, names, namespace, open,
};
use kvrail::config::{Durability, PathSharding};
use kvrail::{Access, ErrorKind, LoadChunk, OpenOptions, Store, StoreChunk};
use proptest::prelude::*;

#[test]
fn chunks_survive_a_restart_and_land_in_other_blocks() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..6).for_each(|block| cache.fill(block, 100 + block as u64));
    let report = cache.store(&[(0, vec![0, 1]), (1, vec![5, 2]), (2, vec![3, 4])]);
    assert_eq!((report.stored, report.failed), (3, 0));
    let expected: Vec<Vec<u8>> = (0..6).map(|block| cache.block(block)).collect();
    store.close(LIMIT).unwrap();
    drop((store, cache));

    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(
        store
            .lookup(0, &[0], (0..5).map(key).collect())
            .wait(LIMIT)
            .unwrap(),
        3
    );
    let report = cache.load(&[
        (0, 0, vec![60, 7]),
        (1, 0, vec![33, 8]),
        (2, 0, vec![9, 10]),
    ]);
    assert_eq!((report.loaded, report.failed), (3, vec![]));
    for (block, source) in [(60, 0), (7, 1), (33, 5), (8, 2), (9, 3), (10, 4)] {
        assert_eq!(cache.block(block), expected[source], "block {block}");
    }
    let metrics = store.metrics();
    assert_eq!((metrics.chunks_loaded, metrics.bytes_loaded), (3, 36_000));
    assert_eq!((metrics.lookups, metrics.chunks_found), (1, 3));
    assert!(
        names(directory.path(), "tmp").is_empty(),
        "no temp file is left"
    );
}

#[test]
fn a_chunk_that_is_held_in_part_is_loaded_in_part() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let geometry = Geometry {
        blocks_per_chunk: 4,
        block_bytes: 5000,
        ..Geometry::default()
    };
    let cache = Cache::attach(&store, 0, geometry);
    (0..4).for_each(|block| cache.fill(block, block as u64 + 1));
    cache.store(&[(0, vec![0, 1, 2, 3])]);
    let before = cache.snapshot();
    for first in 1..4 {
        let targets: Vec<usize> = (first..4).map(|block| 20 + 10 * first + block).collect();
        assert_eq!(cache.load(&[(0, first, targets.clone())]).loaded, 1);
        for (target, source) in targets.iter().zip(first..4) {
            assert_eq!(
                cache.block(*target),
                cache.block(source),
                "from block {first}"
            );
        }
    }
    // The six blocks that were asked for changed, and not one byte beside them.
    let changed = before
        .iter()
        .zip(cache.snapshot())
        .filter(|(old, new)| **old != *new)
        .count();
    assert!(changed <= 6 * 10_000, "{changed} bytes changed");
    assert!(changed > 6 * 9_000, "{changed} bytes changed");
}

#[test]
fn a_damaged_page_of_another_block_does_not_spoil_a_partial_load() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let geometry = Geometry {
        blocks_per_chunk: 2,
        block_bytes: 8192,
        ..Geometry::default()
    };
    let cache = Cache::attach(&store, 0, geometry);
    cache.fill(1, 9);
    cache.store(&[(0, vec![0, 1])]);
    let path = chunk_path(directory.path(), 0, 0);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(
        cache.load(&[(0, 1, vec![40])]).loaded,
        1,
        "its pages are whole"
    );
    assert_eq!(cache.block(40), cache.block(1));
    assert_eq!(cache.load(&[(0, 0, vec![41, 42])]).failed, [0]);
}

#[test]
fn a_prompt_ten_times_larger_than_the_staging_memory_loads() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    // 1 MiB of staging holds three chunk files of 336 KiB; 32 chunks are ten times that.
    let geometry = Geometry {
        layers: 2,
        block_bytes: 81_000,
        blocks_per_chunk: 2,
        blocks: 64,
    };
    let cache = Cache::attach(&store, 0, geometry);
    assert_eq!(cache.kv_cache.staging_buffers(), 3);
    (0..64).for_each(|block| cache.fill(block, block as u64));
    for index in 0..32 {
        let blocks = vec![2 * index, 2 * index + 1];
        while cache.store(&[(index as u64, blocks.clone())]).dropped > 0 {}
    }
    let expected = cache.snapshot();
    (0..64).for_each(|block| cache.fill(block, 1_000_000));
    let all: Vec<_> = (0..32)
        .map(|i| (i as u64, 0, vec![2 * i, 2 * i + 1]))
        .collect();
    assert_eq!(cache.load(&all).loaded, 32);
    assert_eq!(cache.snapshot(), expected);
}

#[test]
fn stores_beyond_the_staging_memory_are_dropped_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let geometry = Geometry {
        layers: 2,
        block_bytes: 81_000,
        blocks_per_chunk: 2,
        blocks: 64,
    };
    let cache = Cache::attach(&store, 0, geometry);
    let chunks: Vec<_> = (0..32)
        .map(|i| (i as u64, vec![2 * i, 2 * i + 1]))
        .collect();
    let report = cache.store(&chunks);
    assert_eq!(report.stored + report.dropped, 32, "{report:?}");
    assert!(report.stored > 0 && report.dropped > 0, "{report:?}");
    assert_eq!(
        store.metrics().stores_dropped_no_buffer,
        report.dropped as u64
    );
    assert_eq!(chunk_files(directory.path()).len(), report.stored);
}

#[test]
fn one_staging_buffer_is_enough_for_loads_and_stores_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let geometry = Geometry {
        layers: 2,
        block_bytes: 200_000,
        blocks_per_chunk: 2,
        blocks: 16,
    };
    let cache = Cache::attach(&store, 0, geometry);
    assert_eq!(cache.kv_cache.staging_buffers(), 1);
    cache.fill(0, 1);
    cache.store(&[(0, vec![0, 1])]);
    let tickets: Vec<_> = (0..40)
        .map(|round| {
            let blocks = vec![2 + round % 6 * 2, 3 + round % 6 * 2];
            let load = LoadChunk {
                chunk: common::chunk(0),
                first_block: 0,
                blocks,
            };
            let store = StoreChunk {
                chunk: common::chunk(round as u64),
                blocks: vec![0, 1],
            };
            (
                cache.kv_cache.load(vec![load]).unwrap(),
                cache.kv_cache.store(&[store]).unwrap(),
            )
        })
        .collect();
    for (load, store) in tickets {
        assert_eq!(load.wait(LIMIT).unwrap().failed, Vec::<usize>::new());
        assert_eq!(store.wait(LIMIT).unwrap().failed, 0);
    }
}

#[test]
fn a_hit_counts_only_when_every_rank_has_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let caches = [0, 1].map(|rank| Cache::attach(&store, rank, Geometry::default()));
    caches[0].store(&[(0, vec![0, 1]), (1, vec![2, 3])]);
    caches[1].store(&[(0, vec![0, 1])]);
    let hit = |ranks: &[u32]| {
        store
            .lookup(0, ranks, vec![key(0), key(1), key(2)])
            .wait(LIMIT)
            .unwrap()
    };
    assert_eq!((hit(&[0]), hit(&[1]), hit(&[0, 1])), (2, 1, 1));
    assert_eq!(store.lookup(0, &[0], vec![]).wait(LIMIT).unwrap(), 0);
    assert_eq!(
        store.lookup(1, &[0], vec![key(0)]).wait(LIMIT).unwrap(),
        0,
        "another group"
    );
}

#[test]
fn a_long_prefix_is_found_whole_and_a_hole_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in 0..300 {
        while cache.store(&[(index, vec![0, 1])]).dropped > 0 {}
    }
    let keys: Vec<_> = (0..400).map(key).collect();
    assert_eq!(
        store.lookup(0, &[0], keys.clone()).wait(LIMIT).unwrap(),
        300
    );
    for hole in [299, 170, 16, 0] {
        std::fs::remove_file(chunk_path(directory.path(), 0, hole)).unwrap();
        assert_eq!(
            store.lookup(0, &[0], keys.clone()).wait(LIMIT).unwrap(),
            hole as usize
        );
    }
}

#[test]
fn each_chunk_is_found_whatever_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let caches = [0, 1].map(|rank| Cache::attach(&store, rank, Geometry::default()));
    for index in 0..200_u64 {
        // The second rank lacks every fifth.
        for cache in caches
            .iter()
            .take(if index.is_multiple_of(5) { 1 } else { 2 })
        {
            while cache.store(&[(index, vec![0, 1])]).dropped > 0 {}
        }
    }
    for index in [0, 7, 8, 199] {
        std::fs::remove_file(chunk_path(directory.path(), 0, index)).unwrap();
    }
    // A store that knows nothing, and the same one when it knows what it found.
    let fresh = open(directory.path());
    for _ in 0..2 {
        for (ranks, lacks_fifths) in [(&[0][..], false), (&[0, 1], true)] {
            let keys: Vec<_> = (0..210).map(key).collect();
            let found = fresh.lookup_each(0, ranks, keys).wait(LIMIT).unwrap();
            let expected = |index: u64| {
                index < 199
                    && ![0, 7, 8].contains(&index)
                    && !(lacks_fifths && index.is_multiple_of(5))
            };
            assert_eq!(found, (0..210).map(expected).collect::<Vec<_>>());
        }
    }
    let metrics = fresh.metrics();
    assert_eq!((metrics.lookups, metrics.chunks_looked_up), (4, 840));
    let nothing = |ranks: &[u32], keys| fresh.lookup_each(0, ranks, keys).wait(LIMIT).unwrap();
    assert_eq!(nothing(&[0], vec![]), Vec::<bool>::new());
    assert_eq!(nothing(&[], vec![key(1), key(2)]), [false, false]);
}

#[test]
fn several_paths_share_the_chunks() {
    let directory = tempfile::tempdir().unwrap();
    let paths: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|name| directory.path().join(name))
        .collect();
    for sharding in [PathSharding::ByHash, PathSharding::ByGpu] {
        let mut config = config(&paths[0]);
        config.gds_path = paths.clone();
        config.gds_path_sharding = sharding;
        let model = format!("{sharding:?}");
        let namespace = kvrail::Namespace::new(&model, serde_json::Map::new()).unwrap();
        let store = Store::open(&config, namespace.clone(), OpenOptions::default()).unwrap();
        let cache = Cache::attach(&store, 1, Geometry::default());
        for index in 0..60 {
            while cache.store(&[(index, vec![0, 1])]).dropped > 0 {}
        }
        assert_eq!(
            store
                .lookup(0, &[1], (0..60).map(key).collect())
                .wait(LIMIT)
                .unwrap(),
            60
        );
        let all: Vec<_> = (0..60).map(|index| (index, 0, vec![2, 3])).collect();
        assert_eq!(cache.load(&all[..1]).loaded, 1);
        let counts: Vec<usize> = paths
            .iter()
            .map(|path| {
                let directory = path.join(namespace.directory_name());
                kvrail::store::inspect::chunks(&directory)
                    .filter(Result::is_ok)
                    .count()
            })
            .collect();
        match sharding {
            PathSharding::ByGpu => assert_eq!(counts, [0, 60, 0]),
            PathSharding::ByHash => assert!(counts.iter().all(|n| *n > 5), "{counts:?}"),
        }
    }
}

#[test]
fn durable_stores_and_two_instances_work_on_one_directory() {
    let directory = tempfile::tempdir().unwrap();
    let mut durable = config(directory.path());
    durable.durability = Durability::Full;
    let first = Store::open(&durable, namespace(), OpenOptions::default()).unwrap();
    let second = open(directory.path());
    let (ours, theirs) = (
        Cache::attach(&first, 0, Geometry::default()),
        Cache::attach(&second, 0, Geometry::default()),
    );
    ours.fill(0, 5);
    assert_eq!(second.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap(), 0);
    assert_eq!(ours.store(&[(0, vec![0, 1])]).stored, 1);
    assert_eq!(second.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap(), 1);
    assert_eq!(theirs.load(&[(0, 0, vec![8, 9])]).loaded, 1);
    assert_eq!(theirs.block(8), ours.block(0));
    assert_eq!(ours.store(&[(0, vec![0, 1])]).already_present, 1);
    assert_eq!(theirs.store(&[(0, vec![0, 1])]).already_present, 1);
}

#[test]
fn a_read_only_store_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        access: Access::ReadOnly,
        ..OpenOptions::default()
    };
    let missing = directory.path().join("not-there");
    let reader = Store::open(&config(&missing), namespace(), options.clone()).unwrap();
    assert_eq!(reader.lookup(0, &[0], vec![key(0)]).wait(LIMIT).unwrap(), 0);
    let cache = Cache::attach(&reader, 0, Geometry::default());
    assert_eq!(cache.store(&[(0, vec![0, 1])]).dropped, 1);
    assert_eq!(cache.load(&[(0, 0, vec![0, 1])]).failed, [0]);
    assert!(!missing.exists());
}

#[test]
fn wrong_settings_are_named_with_key_value_and_expectation() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error = Store::open(&config(&file), namespace(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    let text = error.to_string();
    assert!(
        text.contains("`gds_path` = ") && text.contains("expected a directory"),
        "{text}"
    );

    let store = open(directory.path());
    let layer = kvrail::LayerSpan {
        region: 0,
        offset: 0,
        block_stride: 2 << 20,
        block_bytes: 2 << 20,
    };
    let region = kvrail::Region::zeroed(4 << 20).unwrap();
    let layout = kvrail::KvLayout::new(vec![layer], 2, &[region.bytes()]).unwrap();
    let error = store.attach(0, 0, layout, vec![region], 2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(
        error
            .to_string()
            .contains("`cufile_buffer_size` = 1: expected at least 5"),
        "{error}"
    );
}

#[test]
fn a_manifest_of_another_namespace_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()));
    let manifest = directory
        .path()
        .join(namespace().directory_name())
        .join("manifest.json");
    std::fs::write(&manifest, r#"{"model": "other"}"#).unwrap();
    let error = Store::open(
        &config(directory.path()),
        namespace(),
        OpenOptions::default(),
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    assert!(error.to_string().contains("model"), "{error}");
}

#[test]
fn a_directory_that_is_removed_while_in_use_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    let namespace = directory.path().join(namespace().directory_name());
    std::fs::remove_dir_all(&namespace).unwrap();
    assert_eq!(cache.load(&[(0, 0, vec![0, 1])]).failed, [0]);
    assert_eq!(cache.store(&[(0, vec![0, 1])]).stored, 1);
    assert_eq!(cache.load(&[(0, 0, vec![2, 3])]).loaded, 1);
    assert!(namespace.join("manifest.json").is_file());
}

#[test]
fn a_closed_store_answers_everything() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    store.close(LIMIT).unwrap();
    assert_eq!(cache.store(&[(0, vec![0, 1])]).failed, 1);
    assert_eq!(cache.load(&[(0, 0, vec![0, 1])]).failed, [0]);
}

#[test]
fn wrong_blocks_are_refused_before_anything_happens() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    for blocks in [vec![0], vec![0, 1, 2], vec![0, 64]] {
        let chunk = StoreChunk {
            chunk: common::chunk(0),
            blocks: blocks.clone(),
        };
        assert!(cache.kv_cache.store(&[chunk]).is_err(), "{blocks:?}");
        let load = LoadChunk {
            chunk: common::chunk(0),
            first_block: 0,
            blocks,
        };
        assert!(cache.kv_cache.load(vec![load]).is_err());
    }
    let beyond = LoadChunk {
        chunk: common::chunk(0),
        first_block: 2,
        blocks: vec![],
    };
    assert!(cache.kv_cache.load(vec![beyond]).is_err());
    assert!(chunk_files(directory.path()).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_geometry_round_trips(
        layers in 1_usize..5,
        block_bytes in 1_usize..9000,
        blocks_per_chunk in 1_usize..5,
        first in 0_usize..5,
        seed in any::<u64>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let geometry = Geometry { layers, block_bytes, blocks_per_chunk, blocks: 12 };
        let cache = Cache::attach(&store, 0, geometry);
        let source: Vec<usize> = (0..blocks_per_chunk).collect();
        source.iter().for_each(|block| cache.fill(*block, seed ^ *block as u64));
        prop_assert_eq!(cache.store(&[(3, source)]).stored, 1);
        let first = first % blocks_per_chunk;
        let target: Vec<usize> = (first..blocks_per_chunk).map(|block| 11 - block).collect();
        prop_assert_eq!(cache.load(&[(3, first, target.clone())]).loaded, 1);
        for (block, target) in (first..blocks_per_chunk).zip(target) {
            prop_assert_eq!(cache.block(block), cache.block(target));
        }
        let bytes = std::fs::metadata(chunk_path(directory.path(), 0, 3)).unwrap().len();
        prop_assert_eq!(bytes, cache.kv_cache.chunk_file_bytes() as u64);
    }
}
