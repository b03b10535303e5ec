//! ESTALE, what a network file system says of what another host removed or its server forgot: at every
//! kind of operation, on chunks, accounts and lease alike.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::time::{Duration, Instant};

use common::mount;
use kvrail::config::{Durability, StoreConfig};
use kvrail::store::capacity::usage;
use kvrail::{OpenOptions, Store};
use store::{Cache, Geometry, LIMIT, chunk_files, config, namespace};

const CHUNKS: u64 = 4;
const OPERATIONS: [&str; 22] = [
    "lookup", "getattr", "setattr", "readlink", "mkdir", "symlink", "link", "unlink", "rmdir",
    "rename", "open", "create", "read", "write", "flush", "release", "fsync", "opendir", "readdir",
    "fsyncdir", "statfs", "access",
];

fn settings(path: &std::path::Path) -> StoreConfig {
    StoreConfig {
        max_size: Some(1 << 30),
        durability: Durability::Full,
        wait_limit_seconds: 2.0,
        lookup_limit_seconds: 1.0,
        ..config(path)
    }
}

#[test]
fn a_stale_handle_at_any_operation_is_a_miss_and_no_damage() {
    let Some(mounted) = mount(21) else {
        return;
    };
    let open = || {
        Store::open(
            &settings(mounted.path()),
            namespace(),
            OpenOptions::default(),
        )
    };
    let first = open().unwrap();
    let cache = Cache::attach(&first, 0, Geometry::default());
    for index in 0..CHUNKS {
        assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1);
    }
    first.close(LIMIT).unwrap();
    drop((cache, first));
    let mut opened = 0;
    for (number, operation) in OPERATIONS.iter().enumerate() {
        let store = open().unwrap();
        let cache = Cache::attach(&store, 0, Geometry::default());
        mounted.set(&format!("{operation} * error=ESTALE"));
        let start = Instant::now();
        // Whatever comes of it, it comes, and is no wrong byte: loads compare.
        for index in 0..CHUNKS {
            let report = cache.load(&[(index, 0, vec![2, 3])]);
            assert_eq!(
                report.loaded + report.failed.len(),
                1,
                "{operation}: {report:?}"
            );
        }
        cache.store(&[(100 + number as u64, vec![4, 5])]);
        let keys = vec![store::key(0)];
        // A lookup that fails is an answer, too.
        let _ = store.lookup(0, &[0], keys).wait(LIMIT);
        // Opening says what is wrong, or works where the operation is not needed for it.
        match open() {
            Ok(other) => {
                opened += 1;
                other.close(LIMIT).unwrap();
            }
            Err(error) => assert!(
                error
                    .os_error()
                    .is_some_and(|os| os.raw_os_error() == Some(116)),
                "{operation}: {error}"
            ),
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{operation}");
        mounted.heal();
        let _ = store.close(LIMIT);
        drop((cache, store));
        // Nothing was set aside for it, and a store that starts now has it all.
        let files = chunk_files(mounted.source());
        let aside = |path: &std::path::PathBuf| path.to_string_lossy().contains("quarantine");
        assert!(!files.iter().any(aside), "{operation}: {files:?}");
        let again = open().unwrap();
        let cache = Cache::attach(&again, 0, Geometry::default());
        for index in 0..CHUNKS {
            let report = cache.load(&[(index, 0, vec![2, 3])]);
            assert_eq!(report.loaded, 1, "{operation}: chunk {index}: {report:?}");
        }
        again.close(LIMIT).unwrap();
    }
    assert!(
        mounted.hits() >= 2 * OPERATIONS.len() as u64 / 3,
        "{}",
        mounted.hits()
    );
    println!("opened under {opened} of {} faults", OPERATIONS.len());
    // What is counted is what is there, or more: room is claimed before a file is written.
    let bytes: u64 = chunk_files(mounted.source())
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    let counted = usage(mounted.source()).unwrap().bytes.unwrap();
    assert!(
        counted.abs_diff(bytes) <= bytes,
        "{counted} counted, {bytes} there"
    );
}
