//! Chunks whose content follows from their index.

use std::path::Path;

use super::{Cache, chunk_path};

/// Stores a chunk of known content.
pub fn put(cache: &Cache, index: u64) {
    cache.fill(0, 2 * index);
    cache.fill(1, 2 * index + 1);
    let report = cache.store(&[(index, vec![0, 1])]);
    assert_eq!(report.stored + report.already_present, 1);
}

/// Loads a chunk and compares. Returns whether it came.
pub fn get(cache: &Cache, index: u64) -> bool {
    cache.fill(10, u64::MAX);
    cache.fill(11, u64::MAX);
    let loaded = cache.load(&[(index, 0, vec![10, 11])]).loaded == 1;
    if loaded {
        cache.fill(20, 2 * index);
        cache.fill(21, 2 * index + 1);
        assert_eq!(cache.block(10), cache.block(20), "chunk {index}");
        assert_eq!(cache.block(11), cache.block(21), "chunk {index}");
    }
    loaded
}

/// Removes the file of a chunk behind the store's back.
pub fn remove_file(path: &Path, index: u64) {
    std::fs::remove_file(chunk_path(path, 0, index)).unwrap();
}
