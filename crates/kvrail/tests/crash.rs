//! A writer that is killed at any moment leaves whole chunks only, and nothing for ever.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Cache, Geometry, chunk, chunk_files, names, namespace, open};
use kvrail::StoreChunk;
use kvrail::store::inspect;

/// Names the directory of the process that is to be killed.
const CHILD_DIRECTORY: &str = "KVRAIL_TEST_CRASH_DIRECTORY";
/// Writers that are killed at least, and at most where a slow machine lets them write little.
const KILLS: u64 = 50;
const KILLS_MAX: u64 = 10 * KILLS;
/// Files that must have been written for the test to show enough.
const FILES_MIN: usize = 50;

/// Blocks large enough that a kill falls into a write as often as between two.
const GEOMETRY: Geometry = Geometry {
    layers: 4,
    block_bytes: 24_000,
    blocks_per_chunk: 2,
    blocks: 64,
};

/// The content of chunk `index` in all runs.
fn fill(cache: &Cache, index: u64, first_block: usize) {
    cache.fill(first_block, 2 * index);
    cache.fill(first_block + 1, 2 * index + 1);
}

/// Not a test of its own: the process that `killed_writers_leave_whole_chunks` starts and kills.
#[test]
#[ignore = "runs as the child of killed_writers_leave_whole_chunks"]
fn child() {
    let Ok(directory) = std::env::var(CHILD_DIRECTORY) else {
        eprintln!("skipped: only meant to be started by killed_writers_leave_whole_chunks");
        return;
    };
    let store = open(Path::new(&directory));
    let cache = Cache::attach(&store, 0, GEOMETRY);
    let start = chunk_files(Path::new(&directory)).len() as u64;
    for index in start.. {
        let first = 2 * (index % 32) as usize;
        fill(&cache, index, first);
        let blocks = vec![first, first + 1];
        drop(
            cache
                .kv_cache
                .store(&[StoreChunk {
                    chunk: chunk(index),
                    blocks,
                }])
                .unwrap(),
        );
    }
}

/// Returns the name of `child` in the binary that it is in.
fn child_name() -> String {
    match module_path!().split_once("::") {
        Some((_, module)) => format!("{module}::child"),
        None => "child".to_owned(),
    }
}

#[test]
fn killed_writers_leave_whole_chunks() {
    let directory = tempfile::tempdir().unwrap();
    let mut leftovers_seen = 0;
    let mut kills = 0;
    for round in 0..KILLS_MAX {
        if round >= KILLS && chunk_files(directory.path()).len() > FILES_MIN && leftovers_seen > 0 {
            break;
        }
        kills += 1;
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &child_name(), "--nocapture"])
            .env(CHILD_DIRECTORY, directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Between 5 and 45 ms: from before the first chunk to far into the writing.
        std::thread::sleep(Duration::from_millis(5 + round * 7919 % 41));
        writer.kill().unwrap();
        writer.wait().unwrap();
        leftovers_seen += names(directory.path(), "tmp").len();

        let store = open(directory.path());
        assert!(
            names(directory.path(), "tmp").is_empty(),
            "round {round}: leftovers remain"
        );
        drop(store);
    }
    let files = chunk_files(directory.path());
    let store = open(directory.path());
    let cache = Cache::attach(&store, 0, GEOMETRY);
    for file in inspect::chunks(&directory.path().join(namespace().directory_name())) {
        // The tests' keys end in the chunk's index.
        let key = file.unwrap().key;
        let index = u64::from_le_bytes(key.as_bytes()[24..].try_into().unwrap());
        let report = cache.load(&[(index, 0, vec![40, 41])]);
        assert_eq!(
            report.failed,
            Vec::<usize>::new(),
            "a partial chunk was visible: {report:?}"
        );
        fill(&cache, index, 50);
        assert_eq!(cache.block(40), cache.block(50), "chunk {index}");
        assert_eq!(cache.block(41), cache.block(51), "chunk {index}");
    }
    println!(
        "{kills} kills: {} files, {leftovers_seen} leftovers removed",
        files.len()
    );
    assert!(
        files.len() > FILES_MIN,
        "the writers wrote: {}",
        files.len()
    );
    assert!(
        leftovers_seen > 0,
        "no kill fell into a write; the test shows too little"
    );
    let manifest = directory
        .path()
        .join(namespace().directory_name())
        .join("manifest.json");
    assert!(manifest.is_file());
}
