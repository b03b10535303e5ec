//! Several paths of a store, of which one fails: the others go on, and the right one is blamed.
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

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Mounted, mount};
use kvrail::config::{PathWeights, StoreConfig};
use kvrail::store::inspect::recorded_bandwidth;
use kvrail::{OpenOptions, Store};
use store::{Cache, Geometry, LIMIT, namespace};
use subject::{SLACK, Subject, WAIT_LIMIT, limits};

/// The configuration of two paths, one on the faulty mount and one that is well, and that one.
fn beside_a_well_one(mounted: &Mounted) -> (StoreConfig, PathBuf) {
    let well = mounted.folder.path().join("well");
    let mut config = limits(mounted.path());
    config.gds_path.push(well.clone());
    (config, well)
}

fn open(config: &StoreConfig) -> Subject {
    let store = Store::open(config, namespace(), OpenOptions::default()).unwrap();
    Subject {
        cache: Cache::attach(&store, 0, Geometry::default()),
        store,
        longest: [Duration::ZERO; 3],
    }
}

#[test]
fn one_path_that_hangs_leaves_the_others_alone() {
    let Some(mounted) = mount(18) else {
        return;
    };
    let (config, well) = beside_a_well_one(&mounted);
    let mut subject = open(&config);
    let indices: Vec<u64> = (0..40).collect();
    for index in &indices {
        assert!(subject.store_chunk(*index));
    }
    let is_well = |index: &u64| store::chunk_path(&well, 0, *index).exists();
    let good: Vec<u64> = indices.iter().copied().filter(is_well).collect();
    assert!((5..35).contains(&good.len()), "{}", good.len());
    mounted.set("read * hang");
    // All at once: those that hang are in the way of the others, for one limit at most.
    let chunks: Vec<_> = indices
        .iter()
        .map(|index| (*index, 0, vec![10, 11]))
        .collect();
    let start = Instant::now();
    let report = subject.cache.load(&chunks);
    println!(
        "{} of {} loaded in {:.2?}",
        report.loaded,
        good.len(),
        start.elapsed()
    );
    assert!(report.loaded >= good.len() - 2, "{report:?}");
    assert!(start.elapsed() < Duration::from_secs_f64(WAIT_LIMIT) + SLACK);
    for index in &good {
        let start = Instant::now();
        assert!(subject.load_chunk(*index));
        assert!(start.elapsed() < SLACK);
    }
    mounted.heal();
}

#[test]
fn a_path_that_hangs_is_blamed_for_it_also_by_a_load_from_another() {
    let Some(mounted) = mount(21) else {
        return;
    };
    let (config, well) = beside_a_well_one(&mounted);
    let mut before = open(&config);
    (0..40).for_each(|index| assert!(before.store_chunk(index)));
    before.store.close(LIMIT).unwrap();
    drop(before);
    let is_well = |index: u64| store::chunk_path(&well, 0, index).exists();
    let after_the_other: Vec<u64> = (1..40)
        .filter(|&index| is_well(index) && !is_well(index - 1))
        .collect();
    assert!(after_the_other.len() > 4, "{after_the_other:?}");
    for index in 0..40 {
        let root = if is_well(index) {
            &well
        } else {
            mounted.source()
        };
        let file = std::fs::File::options()
            .write(true)
            .open(store::chunk_path(root, 0, index))
            .unwrap();
        let age = Duration::from_secs(3600 + index);
        file.set_modified(std::time::SystemTime::now() - age)
            .unwrap();
    }
    // For a store that knows nothing yet a load asks when the chunk before its own was used last.
    let mut subject = open(&config);
    mounted.set("lookup,getattr * hang");
    // No load waits for that.
    for index in &after_the_other {
        let start = Instant::now();
        assert!(subject.load_chunk(*index), "{index}");
        assert!(start.elapsed() < SLACK, "{:?}", start.elapsed());
    }
    store::wait_until("the path is out", || {
        subject.store.metrics().paths_taken_out > 0
    });
    for index in &after_the_other {
        let start = Instant::now();
        assert!(subject.load_chunk(*index), "{index}");
        assert!(start.elapsed() < SLACK, "{:?}", start.elapsed());
    }
    assert_eq!(subject.store.metrics().paths_taken_out, 1);
    mounted.heal();
}

#[test]
fn a_record_of_a_bandwidth_that_hangs_or_fails_costs_no_other_path_s_chunks() {
    let Some(mounted) = mount(27) else {
        return;
    };
    let (mut config, well) = beside_a_well_one(&mounted);
    config.path_weights = PathWeights::Measured;
    // Nothing can be recorded at first, so the faulty path has the weight that everybody knows.
    mounted.set("create */.record.* error=EIO");
    let mut subject = open(&config);
    let recorded = |path: &Path| recorded_bandwidth(path).unwrap().map(|one| one.mb_per_s);
    assert_eq!(recorded(mounted.source()), None);
    let its_own = recorded(&well).unwrap();
    let notices = subject.store.take_notices();
    assert!(
        notices
            .iter()
            .any(|one| one.message.contains("as without a record")),
        "{notices:?}"
    );
    mounted.heal();
    let indices: Vec<u64> = (0..40).collect();
    for index in &indices {
        assert!(subject.store_chunk(*index));
    }
    // Weights as of two paths alike: they do not follow from this machine's noise.
    drop(subject);
    let record = |rate: u64| {
        format!("{{\"format\":1,\"mb_per_s\":{rate},\"write_mb_per_s\":1,\"read_mb_per_s\":1}}")
    };
    std::fs::write(well.join(".kvrail/bandwidth"), record(3000)).unwrap();
    let state = mounted.source().join(".kvrail");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(state.join("bandwidth"), record(3000)).unwrap();
    let mut subject = open(&config);
    for index in &indices {
        subject.store_chunk(*index);
        assert!(subject.load_chunk(*index));
    }
    drop(subject);
    let is_well = |index: &u64| store::chunk_path(&well, 0, *index).exists();
    let good: Vec<u64> = indices.iter().copied().filter(is_well).collect();
    println!(
        "{} of 40 on the path that is well, {its_own} MB/s",
        good.len()
    );
    assert!(good.len() > 5);
    for fault in [
        "open *.kvrail/bandwidth error=EIO",
        "open *.kvrail/bandwidth hang",
    ] {
        mounted.set(fault);
        let start = Instant::now();
        let mut subject = open(&config);
        println!("{fault}: open after {:.2?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs_f64(2.0 * WAIT_LIMIT) + SLACK);
        let notices = subject.store.take_notices();
        assert!(
            notices
                .iter()
                .any(|one| one.message.contains("its weight is 1000")),
            "{notices:?}"
        );
        // A third of the weight that it had: all chunks of the other path are where they were.
        for index in &good {
            assert!(subject.load_chunk(*index), "{fault}: chunk {index}");
        }
        mounted.heal();
    }
}
