//! The checked-in chunk of format 1 loads, and the same content is still written bit for bit.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::{Path, PathBuf};

use common::{Cache, Geometry, chunk_path, config, namespace};
use kvrail::store::inspect;
use kvrail::{OpenOptions, Store};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

/// Copies the fixture's namespace, since a store writes to its directory.
fn copy_tree(source: &Path, target: &Path) {
    std::fs::create_dir_all(target).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let target = target.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// A store whose chunks have 256 tokens, as the fixture's, with the fixture's blocks filled.
fn open_filled(path: &Path) -> (Store, Cache) {
    let store = Store::open(&config(path), namespace(), OpenOptions::default()).unwrap();
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..4).for_each(|block| cache.fill(block, 4_000 + block as u64));
    (store, cache)
}

#[test]
fn chunks_of_format_1_load() {
    let directory = tempfile::tempdir().unwrap();
    copy_tree(&fixture(), directory.path());
    let (store, cache) = open_filled(directory.path());
    let report = cache.load(&[(0, 0, vec![10, 11]), (1, 0, vec![12, 13])]);
    assert_eq!(report.loaded, 2, "{report:?}");
    for block in 0..4 {
        assert_eq!(cache.block(10 + block), cache.block(block));
    }
    drop(store);
    let found = inspect::namespaces(directory.path()).unwrap();
    let manifest = found[0].manifest.clone().unwrap();
    let summaries: Vec<_> = inspect::chunks(&found[0].directory)
        .map(|file| inspect::verify_chunk(&file.unwrap(), &manifest).unwrap())
        .collect();
    assert_eq!(summaries.len(), 2);
    assert!(
        summaries
            .iter()
            .all(|s| s.tokens == 256 && s.shape == [2, 2, 3000])
    );
}

#[test]
fn the_same_content_is_written_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let (_store, cache) = open_filled(directory.path());
    assert_eq!(cache.store(&[(0, vec![0, 1]), (1, vec![2, 3])]).stored, 2);
    for index in 0..2 {
        let written = std::fs::read(chunk_path(directory.path(), 0, index)).unwrap();
        let expected = std::fs::read(chunk_path(&fixture(), 0, index)).unwrap();
        assert!(written == expected, "chunk {index} differs from format 1");
    }
}

/// Writes the fixture. For a new format version only: `cargo test -- --ignored write_fixture`
/// with the folder's name changed; the old folder stays and must still load.
#[test]
#[ignore = "writes the fixture; only for a new format version"]
fn write_fixture() {
    let (store, cache) = open_filled(&fixture());
    assert_eq!(cache.store(&[(0, vec![0, 1]), (1, vec![2, 3])]).stored, 2);
    store.close(common::LIMIT).unwrap();
}
