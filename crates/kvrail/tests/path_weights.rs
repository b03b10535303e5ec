//! Several paths: how large a share each gets, and that all instances agree on it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::{Path, PathBuf};

use common::{Cache, Geometry, LIMIT, chunk_files, config, key, namespace, open_as};
use kvrail::config::{PathSharding, PathWeights, StoreConfig};
use kvrail::store::NoticeLevel;
use kvrail::store::capacity::{CollectOptions, collect};
use kvrail::store::inspect::{recorded_bandwidth, remove_namespace};
use kvrail::{Access, OpenOptions, Store};

const CHUNKS: u64 = 120;

/// Paths below a directory of their own, placed by what is measured.
fn measured(paths: &[PathBuf]) -> StoreConfig {
    StoreConfig {
        gds_path: paths.to_vec(),
        path_weights: PathWeights::Measured,
        ..config(&paths[0])
    }
}

fn below(root: &tempfile::TempDir, names: &[&str]) -> Vec<PathBuf> {
    let paths = names.iter().map(|name| root.path().join(name));
    paths
        .inspect(|path| std::fs::create_dir(path).unwrap())
        .collect()
}

fn record(path: &Path) -> PathBuf {
    path.join(".kvrail/bandwidth")
}

/// Records a bandwidth as another instance would have.
fn set_record(path: &Path, mb_per_s: u64) {
    let text = format!(
        "{{\"format\":1,\"mb_per_s\":{mb_per_s},\"write_mb_per_s\":1,\"read_mb_per_s\":1}}\n"
    );
    std::fs::create_dir_all(path.join(".kvrail")).unwrap();
    std::fs::write(record(path), text).unwrap();
    assert_eq!(
        recorded_bandwidth(path).unwrap().unwrap().mb_per_s,
        mb_per_s
    );
}

fn store_all(store: &Store) {
    let cache = Cache::attach(store, 0, Geometry::default());
    for index in 0..CHUNKS {
        cache.fill(0, index);
        cache.fill(1, index + 1000);
        assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1, "{index}");
    }
}

/// Returns the chunks that a store finds; each is loaded, too.
fn found(store: &Store) -> Vec<u64> {
    let cache = Cache::attach(store, 0, Geometry::default());
    let is_there = |index: &u64| {
        let looked_up = store.lookup(0, &[0], vec![key(*index)]).wait(LIMIT);
        let loaded = cache.load(&[(*index, 0, vec![2, 3])]).loaded;
        if loaded == 1 {
            cache.fill(0, *index);
            assert_eq!(cache.block(2), cache.block(0), "{index}");
        }
        assert_eq!(looked_up.unwrap(), loaded, "{index}");
        loaded == 1
    };
    (0..CHUNKS).filter(is_there).collect()
}

fn is_on(path: &Path, index: u64) -> bool {
    common::chunk_path(path, 0, index).exists()
}

fn read_only(config: &StoreConfig) -> Store {
    let options = OpenOptions {
        access: Access::ReadOnly,
        ..OpenOptions::default()
    };
    Store::open(config, namespace(), options).unwrap()
}

#[test]
fn who_opens_several_paths_first_measures_and_all_take_the_winner_s_value() {
    let root = tempfile::tempdir().unwrap();
    let paths = below(&root, &["a", "b", "c"]);
    let config = measured(&paths);
    let stores: Vec<Store> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| open_as(&config))).collect();
        let stores = threads.into_iter().map(|one| one.join().unwrap());
        stores.collect()
    });
    let rates = || -> Vec<u64> {
        let rate = |path: &PathBuf| recorded_bandwidth(path).unwrap().unwrap().mb_per_s;
        paths.iter().map(rate).collect()
    };
    let recorded = rates();
    println!("{recorded:?} MB/s");
    store_all(&stores[0]);
    for store in &stores {
        assert_eq!(found(store).len() as u64, CHUNKS, "they agree");
        let notices = store.take_notices();
        let warned = notices.iter().any(|one| one.level == NoticeLevel::Warning);
        assert!(!warned, "{notices:?}");
    }
    // The order of the list does not matter, and nothing is measured again.
    let mut turned = config.clone();
    turned.gds_path.reverse();
    for config in [&config, &turned] {
        assert_eq!(found(&open_as(config)).len() as u64, CHUNKS);
        assert_eq!(found(&read_only(config)).len() as u64, CHUNKS);
    }
    assert_eq!(rates(), recorded);
    for path in &paths {
        let left = std::fs::read_dir(path.join(namespace().directory_name()).join("tmp"));
        assert_eq!(left.unwrap().count(), 0, "a file is left");
    }
}

#[test]
fn shares_follow_the_records_and_only_chunks_of_a_path_weighted_anew_are_missed() {
    let root = tempfile::tempdir().unwrap();
    let paths = below(&root, &["a", "b", "c"]);
    let config = measured(&paths);
    for (path, rate) in paths.iter().zip([4000, 2000, 4000]) {
        set_record(path, rate);
    }
    store_all(&open_as(&config));
    let on =
        |path: &PathBuf| -> Vec<u64> { (0..CHUNKS).filter(|index| is_on(path, *index)).collect() };
    let counts: Vec<usize> = paths.iter().map(|path| on(path).len()).collect();
    println!("{counts:?} of {CHUNKS}");
    assert_eq!(counts.iter().sum::<usize>() as u64, CHUNKS);
    assert!((10..40).contains(&counts[1]) && counts[0] > 28 && counts[2] > 28);
    // What cannot be read as a record counts as the default weight, less than it was: no chunk of
    // the others is looked for elsewhere.
    for text in ["", "{\"format\":1,\"mb_per_s\":4000", "4000"] {
        std::fs::write(record(&paths[2]), text).unwrap();
        let store = open_as(&config);
        let still = found(&store);
        for index in on(&paths[0]).iter().chain(&on(&paths[1])) {
            assert!(still.contains(index), "chunk {index} was missed");
        }
        assert!(still.len() < CHUNKS as usize, "weighs as much as before");
        let notices = store.take_notices().into_iter();
        let warned: Vec<_> = notices
            .filter(|one| one.level == NoticeLevel::Warning)
            .collect();
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert!(warned[0].message.contains("its weight is 1000"));
        assert!(warned[0].message.contains("bandwidth"), "{warned:?}");
        let left = std::fs::read_to_string(record(&paths[2])).unwrap();
        assert_eq!(left, text, "it is not replaced");
    }
    // A path that goes takes its chunks along, and no others; when it is back all are there.
    set_record(&paths[2], 4000);
    let two = measured(&paths[..2]);
    let mut expected = [on(&paths[0]), on(&paths[1])].concat();
    expected.sort_unstable();
    assert_eq!(found(&open_as(&two)), expected);
    assert_eq!(found(&open_as(&config)).len() as u64, CHUNKS);
}

#[test]
fn a_list_of_weights_or_equal_ones_measure_and_record_nothing() {
    let root = tempfile::tempdir().unwrap();
    let paths = below(&root, &["a", "b"]);
    let with = |path_weights, count: usize, gds_path_sharding| StoreConfig {
        path_weights,
        gds_path: paths[..count].to_vec(),
        gds_path_sharding,
        ..config(&paths[0])
    };
    let listed = PathWeights::Listed(vec![1.0, 9.0]);
    let store = open_as(&with(listed.clone(), 2, PathSharding::ByHash));
    store_all(&store);
    let counts = [0, 1].map(|index| chunk_files(&paths[index]).len());
    println!("{counts:?} of {CHUNKS} with weights 1 and 9");
    assert!(counts[0] > 1 && counts[0] < 30, "{counts:?}");
    for (weights, count, sharding) in [
        (PathWeights::Equal, 2, PathSharding::ByHash),
        (PathWeights::Measured, 1, PathSharding::ByHash),
        (PathWeights::Measured, 2, PathSharding::ByGpu),
    ] {
        drop(open_as(&with(weights, count, sharding)));
    }
    // Nothing is written where nothing may be.
    drop(read_only(&with(
        PathWeights::Measured,
        2,
        PathSharding::ByHash,
    )));
    assert!(paths.iter().all(|path| !record(path).exists()));
    // The ratio counts.
    let same = PathWeights::Listed(vec![0.5, 4.5]);
    let store = open_as(&with(same, 2, PathSharding::ByHash));
    assert_eq!(found(&store).len() as u64, CHUNKS);
    let wrong = with(listed, 1, PathSharding::ByHash);
    let error = Store::open(&wrong, namespace(), OpenOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`extra_config.path_weights` = [1.0, 9.0]: expected as many numbers as gds_path has \
         directories (1)"
    );
}

#[test]
fn what_collects_evicts_and_removes_leaves_the_record_alone() {
    let root = tempfile::tempdir().unwrap();
    let paths = below(&root, &["a", "b"]);
    let mut config = measured(&paths);
    config.max_size = Some(30 * common::FILE_BYTES);
    let store = open_as(&config);
    let records = || -> Vec<Vec<u8>> {
        let text = |path: &PathBuf| std::fs::read(record(path)).unwrap();
        paths.iter().map(text).collect()
    };
    let recorded = records();
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in 0..CHUNKS {
        cache.fill(0, index);
        cache.store(&[(index, vec![0, 1])]);
    }
    let evicted = || store.metrics().bytes_evicted > 0;
    common::wait_until("an eviction", evicted);
    drop(store);
    for path in &paths {
        let all = CollectOptions {
            to_bytes: Some(0),
            ..CollectOptions::default()
        };
        collect(path, &all).unwrap();
        remove_namespace(&path.join(namespace().directory_name()), &mut |_| ()).unwrap();
        drop(kvrail::store::capacity::usage(path));
    }
    assert_eq!(records(), recorded);
}
