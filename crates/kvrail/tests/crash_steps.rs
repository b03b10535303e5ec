//! `kill -9` right after each single step of opening a store and publishing chunks, then reopening.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Cache, Geometry, chunk_files, config, key, names, namespace, open};
use kvrail::config::Durability;
use kvrail::io::Observer;
use kvrail::{OpenOptions, Store};

/// Directory, number of the step to die at, and durability of the process that dies.
const CHILD: [&str; 3] = [
    "KVRAIL_TEST_STEP_DIRECTORY",
    "KVRAIL_TEST_STEP",
    "KVRAIL_TEST_STEP_DURABILITY",
];
/// Chunks that the child stores, one after the other.
const CHUNKS: u64 = 2;
/// More steps than there are.
const STEPS_MAX: u64 = 200;

/// Opens a store and stores chunks; `tell` hears of each step.
fn store_chunks(directory: &Path, durability: Durability, observer: Observer) {
    let mut config = config(directory);
    config.durability = durability;
    let options = OpenOptions {
        observer: Some(observer),
        ..OpenOptions::default()
    };
    let store = Store::open(&config, namespace(), options).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in 0..CHUNKS {
        fill(&cache, index);
        assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1);
    }
}

fn fill(cache: &Cache, index: u64) {
    cache.fill(0, 2 * index);
    cache.fill(1, 2 * index + 1);
}

/// Not a test of its own: the process that dies.
#[test]
#[ignore = "runs as the child of a_writer_may_die_after_any_step"]
fn child() {
    let [Ok(directory), Ok(step), Ok(durability)] = CHILD.map(std::env::var) else {
        eprintln!("skipped: only meant to be started by a_writer_may_die_after_any_step");
        return;
    };
    let last: u64 = step.parse().unwrap();
    let durability = if durability == "full" {
        Durability::Full
    } else {
        Durability::None
    };
    let seen = AtomicU64::new(0);
    let observer = Observer::new(move |_| {
        if seen.fetch_add(1, Ordering::SeqCst) == last {
            // Nothing of this process runs after it: no destructor, no other thread.
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        }
    });
    store_chunks(Path::new(&directory), durability, observer);
}

#[test]
fn a_writer_may_die_after_any_step() {
    for durability in ["none", "full"] {
        let mut visible = Vec::new();
        for step in 0..STEPS_MAX {
            let folder = tempfile::tempdir().unwrap();
            let directory = folder.path().join("kv");
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "child", "--nocapture"])
                .envs(CHILD.into_iter().zip([
                    directory.to_str().unwrap(),
                    &step.to_string(),
                    durability,
                ]))
                .stdin(Stdio::null())
                .output()
                .unwrap();
            if output.status.success() {
                // It had no step left to die at.
                break;
            }
            let died = std::os::unix::process::ExitStatusExt::signal(&output.status);
            assert_eq!(died, Some(9), "{}", String::from_utf8_lossy(&output.stderr));

            let store = open(&directory);
            assert!(
                names(&directory, "tmp").is_empty(),
                "step {step}: a temp file is left"
            );
            let cache = Cache::attach(&store, 0, Geometry::default());
            let files = chunk_files(&directory).len();
            visible.push(files);
            // What is visible is whole; what is not can be stored.
            for index in 0..CHUNKS {
                let found = store.lookup(0, &[0], vec![key(index)]);
                let found = found.wait(common::LIMIT).unwrap();
                let loaded = cache.load(&[(index, 0, vec![4, 5])]).loaded;
                assert_eq!(found, loaded, "step {step}: chunk {index}");
                fill(&cache, index);
                if loaded == 1 {
                    assert_eq!(cache.block(4), cache.block(0), "step {step}: chunk {index}");
                    assert_eq!(cache.block(5), cache.block(1), "step {step}: chunk {index}");
                } else {
                    assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1, "step {step}");
                }
            }
            assert!(names(&directory, "tmp").is_empty());
            assert_eq!(
                chunk_files(&directory).len(),
                CHUNKS as usize,
                "step {step}"
            );
        }
        println!(
            "durability {durability}: killed after each of {} steps",
            visible.len()
        );
        assert!(
            (8..STEPS_MAX as usize).contains(&visible.len()),
            "{visible:?}"
        );
        // Chunks become visible in order, and the last deaths come after both are there.
        assert!(visible.is_sorted(), "{visible:?}");
        assert_eq!(
            (visible.first(), visible.last()),
            (Some(&0), Some(&2)),
            "{visible:?}"
        );
    }
}
