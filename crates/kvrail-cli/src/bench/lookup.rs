//! How long one lookup of 512 chunks takes.
//!
//! A store of its own with chunks of one 4 KiB block: a lookup asks for names, so the size of the
//! files does not matter. What is timed: from the call of `Store::lookup` until its ticket is done.
//! `present` and `missing` use a store opened anew for each measurement, so that it knows nothing
//! and asks the file system (whose own cache of names is warm); `repeated` asks the same store
//! again. `bare` is what the file system itself takes: one thread that asks for the status of the
//! same files, one system call each, in turn with the others.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::{
    Access, ChunkKey, ChunkRef, KvLayout, LayerSpan, Namespace, OpenOptions, Region, Store,
    StoreChunk,
};
use rustix::fs::{AtFlags, statat};
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
    /// One thread that asks the system for the status of the same files, one after the other.
    pub(crate) bare_ms: Spread,
    /// `present` over `bare`, measurement by measurement.
    pub(crate) present_to_bare: Spread,
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
    let root = directory.join("lookup");
    let files = chunk_files(&root)?;
    let root = File::open(&root).map_err(|error| Failure::io("open", &root, &error))?;
    let (mut present, mut repeated, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    let mut bare = Vec::new();
    for repeat in 0..REPEATS {
        // Who asks first finds the names in the system's memory, but not in the CPU's.
        if repeat % 2 == 0 {
            bare.push(time_bare(&root, &files)?);
        }
        let store = open(&config, Access::ReadOnly)?;
        present.push(time(&store, &keys, CHUNKS)?);
        repeated.push(time(&store, &keys, CHUNKS)?);
        missing.push(time(&store, &absent, 0)?);
        store.close(WAIT_LIMIT)?;
        if repeat % 2 == 1 {
            bare.push(time_bare(&root, &files)?);
        }
    }
    let ratios = present.iter().zip(&bare).map(|(found, bare)| found / bare);
    Ok(LookupTimes {
        present_to_bare: Spread::of(ratios),
        bare_ms: Spread::of(bare),
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

/// Returns the chunk files below `root`, by their names relative to it, in the order of their keys.
fn chunk_files(root: &Path) -> Result<Vec<PathBuf>, Failure> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        let failed = |error| Failure::io("list", &folder, &error);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|ending| ending == "safetensors")
            {
                files.push(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
            }
        }
    }
    if files.len() != CHUNKS {
        let message = format!("{} chunk files were written, not {CHUNKS}", files.len());
        return Err(Failure::new(message));
    }
    files.sort();
    Ok(files)
}

/// Returns the milliseconds in which one thread asks for the status of all `files`.
fn time_bare(root: &File, files: &[PathBuf]) -> Result<f64, Failure> {
    let start = Instant::now();
    for file in files {
        statat(root, file, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| Failure::io("stat", file, &errno.into()))?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e3)
}
