//! How long one lookup of 512 chunks takes.
//!
//! A store of its own with chunks of one 4 KiB block: a lookup asks for names, so the size of the
//! files does not matter. What is timed: from the call of `Store::lookup` until its ticket is done.
//! `present` and `missing` use a store opened anew for each measurement, so that it knows nothing
//! and asks the file system (whose own cache of names is warm); `repeated` asks the same store
//! again.

use std::path::Path;
use std::time::{Duration, Instant};

use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::{
    Access, ChunkKey, ChunkRef, KvLayout, LayerSpan, Namespace, OpenOptions, Region, Store,
    StoreChunk,
};
use serde::Serialize;

use super::statistics::Spread;
use super::submission::key_of;
use crate::failure::Failure;

/// Chunks of one lookup: 131072 tokens, the longest prompt of Llama 3.1.
pub(crate) const CHUNKS: usize = 512;
/// Lookups per figure.
pub(crate) const REPEATS: usize = 20;
/// Bytes of the only block of a chunk here.
const BLOCK_BYTES: usize = 4096;
/// Longest wait for one lookup or one chunk.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Milliseconds of one lookup of [`CHUNKS`] chunks, over [`REPEATS`] lookups.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LookupTimes {
    pub(crate) chunks: usize,
    pub(crate) repeats: usize,
    /// All present, asked by a store that has not seen them.
    pub(crate) present_ms: Spread,
    /// All present, asked a second time.
    pub(crate) repeated_ms: Spread,
    /// None present.
    pub(crate) missing_ms: Spread,
}

/// Measures lookups below `directory`.
pub(crate) fn measure(directory: &Path, threads: usize) -> Result<LookupTimes, Failure> {
    let config = StoreConfig {
        gds_backend: GdsBackend::Posix,
        disk_io_threads: threads,
        buffer_mib: 4,
        ..StoreConfig::with_path(directory.join("lookup"))
    };
    let keys = (0..CHUNKS as u64)
        .map(key_of)
        .collect::<Result<Vec<_>, _>>()?;
    let absent = (0..CHUNKS as u64).map(|item| key_of(item + (1 << 40)));
    let absent = absent.collect::<Result<Vec<_>, _>>()?;
    fill(&config, &keys)?;
    let (mut present, mut repeated, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let store = open(&config, Access::ReadOnly)?;
        present.push(time(&store, &keys, CHUNKS)?);
        repeated.push(time(&store, &keys, CHUNKS)?);
        missing.push(time(&store, &absent, 0)?);
        store.close(WAIT_LIMIT)?;
    }
    Ok(LookupTimes {
        chunks: CHUNKS,
        repeats: REPEATS,
        present_ms: Spread::of(present),
        repeated_ms: Spread::of(repeated),
        missing_ms: Spread::of(missing),
    })
}

fn open(config: &StoreConfig, access: Access) -> Result<Store, Failure> {
    let namespace = Namespace::new("lookup", serde_json::Map::new())?;
    Ok(Store::open(
        config,
        namespace,
        OpenOptions {
            access,
            ..OpenOptions::default()
        },
    )?)
}

/// Stores a chunk per key.
fn fill(config: &StoreConfig, keys: &[ChunkKey]) -> Result<(), Failure> {
    let store = open(config, Access::ReadWrite)?;
    let memory = Region::zeroed(BLOCK_BYTES)?;
    let span = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    let layout = KvLayout::new(vec![span], 1, &[memory.bytes()])?;
    let kv_cache = store.attach(0, 0, layout, vec![memory], 1)?;
    let mut parent = None;
    for key in keys {
        let chunk = StoreChunk {
            chunk: ChunkRef { key: *key, parent },
            blocks: vec![0],
        };
        // One at a time, so that the staging pool never has to drop one.
        let report = kv_cache.store(&[chunk])?.wait(WAIT_LIMIT)?;
        if report.stored != 1 {
            return Err(Failure::new(format!(
                "a chunk for lookups was not stored: {report:?}"
            )));
        }
        parent = Some(*key);
    }
    Ok(store.close(WAIT_LIMIT)?)
}

/// Returns the milliseconds of one lookup, whose answer must be `expected`.
fn time(store: &Store, keys: &[ChunkKey], expected: usize) -> Result<f64, Failure> {
    let keys = keys.to_vec();
    let start = Instant::now();
    let found = store.lookup(0, &[0], keys).wait(WAIT_LIMIT)?;
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    if found != expected {
        return Err(Failure::new(format!(
            "lookup found {found} chunks, expected {expected}"
        )));
    }
    Ok(milliseconds)
}
