//! One measurement of a store with many chunks, in a process of its own: what opening costs in
//! memory can only be told where nothing was opened before, and a process that opened the store
//! before knows what it looked up.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::store::inspect::find_chunk;
use kvrail::{KvCache, KvLayout, LayerSpan, Namespace, OpenOptions, Region, Store, StoreChunk};
use serde::{Deserialize, Serialize};

use crate::bench::arguments::Engine;
use crate::bench::lookup::CHUNKS as LOOKED_UP;
use crate::bench::submission::{self, Submission, WAIT_LIMIT, chunk_ref, key_of};
use crate::failure::Failure;
use crate::output::write_json;

/// The hidden command.
pub(crate) const PROBE_COMMAND: &str = "bench-growth-probe";
/// Chunks stored and loaded.
pub(super) const MOVED: u64 = 32;
/// A chunk: blocks of 16 KiB, 256 KiB in all.
const BLOCK_BYTES: usize = 16 << 10;
const BLOCKS: usize = 16;
/// Numbers from here on are no chunk's.
const MISSING: u64 = 1 << 40;
/// Numbers from here on are stored while measuring, and removed.
const NEW: u64 = 1 << 41;
/// Staging memory: few chunks, since one is stored or loaded at a time.
const STAGING_MIB: usize = 32;

/// The arguments of the hidden command.
#[derive(Debug, Args)]
pub(crate) struct ProbeArguments {
    /// The directory of the store
    #[arg(long)]
    directory: PathBuf,
    /// Chunks in it
    #[arg(long)]
    chunks: u64,
    /// Threads of the store
    #[arg(long)]
    threads: usize,
    /// The engine of the store
    #[arg(long, value_enum)]
    engine: Engine,
}

/// What one process measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) open_ms: f64,
    /// Growth of the process's resident memory by opening the store.
    pub(super) open_bytes: f64,
    pub(super) present_ms: f64,
    pub(super) missing_ms: f64,
    /// Per chunk.
    pub(super) store_ms: f64,
    pub(super) load_ms: f64,
}

/// Measures once and prints the figures as JSON.
pub(crate) fn run(arguments: &ProbeArguments) -> Result<ExitCode, Failure> {
    let before = resident_bytes()?;
    let (open_ms, small) =
        timed(|| Small::open(&arguments.directory, arguments.threads, arguments.engine))?;
    let open_bytes = resident_bytes()?.saturating_sub(before) as f64;
    // Opening does not wait for it, and nothing after that should be disturbed by it.
    small.wait_for_engines()?;
    let cache = small.attach()?;
    // All over the store, and no two beside each other.
    let step = arguments.chunks / LOOKED_UP as u64;
    let present = (0..LOOKED_UP as u64).map(|index| index * step);
    let (present_ms, ()) = timed(|| small.look_up(present, LOOKED_UP))?;
    let missing = (0..LOOKED_UP as u64).map(|index| MISSING + index);
    let (missing_ms, ()) = timed(|| small.look_up(missing, 0))?;
    let (store_ms, ()) = timed(|| small.store(&cache, NEW, MOVED))?;
    let (load_ms, ()) = timed(|| load(&cache, NEW, MOVED))?;
    small.remove(NEW, MOVED)?;
    small.close()?;
    let found = Found {
        open_ms,
        open_bytes,
        present_ms,
        missing_ms,
        store_ms: store_ms / MOVED as f64,
        load_ms: load_ms / MOVED as f64,
    };
    write_json(&mut io::stdout().lock(), &found)?;
    Ok(ExitCode::SUCCESS)
}

fn timed<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<(f64, T), Failure> {
    let start = Instant::now();
    let found = work()?;
    Ok((start.elapsed().as_secs_f64() * 1e3, found))
}

/// Returns this process's resident memory.
fn resident_bytes() -> Result<u64, Failure> {
    let path = Path::new("/proc/self/status");
    let text = std::fs::read_to_string(path).map_err(|error| Failure::io("read", path, &error))?;
    let kibibytes = text.lines().find_map(|line| {
        let rest = line.strip_prefix("VmRSS:")?;
        rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let kibibytes = kibibytes.ok_or_else(|| Failure::new("the system does not tell VmRSS"))?;
    Ok(kibibytes << 10)
}

/// A store of small chunks.
pub(super) struct Small {
    store: Store,
    directory: PathBuf,
}

impl Small {
    /// Opens it; memory is taken when the first chunk is stored or loaded.
    pub(super) fn open(path: &Path, threads: usize, engine: Engine) -> Result<Self, Failure> {
        let config = StoreConfig {
            gds_backend: GdsBackend::Posix,
            io_engine: engine.choice(),
            disk_io_threads: threads,
            buffer_mib: STAGING_MIB,
            ..StoreConfig::with_path(path)
        };
        let namespace = Namespace::new("growth", serde_json::Map::new())?;
        let directory = path.join(namespace.directory_name());
        let store = Store::open(&config, namespace, OpenOptions::default())?;
        Ok(Self { store, directory })
    }

    /// Waits until it is decided which engine moves its bytes.
    fn wait_for_engines(&self) -> Result<(), Failure> {
        Ok(self.store.wait_for_engines(WAIT_LIMIT)?)
    }

    /// Gives it memory to store from and load into.
    pub(super) fn attach(&self) -> Result<KvCache, Failure> {
        let memory = Region::zeroed(BLOCKS * BLOCK_BYTES)?;
        let span = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: BLOCK_BYTES,
            block_bytes: BLOCK_BYTES,
        };
        let layout = KvLayout::new(vec![span], BLOCKS, &[memory.bytes()])?;
        Ok(self.store.attach(0, 0, layout, vec![memory], BLOCKS)?)
    }

    /// Stores chunks one after the other: as many as given, from a number on.
    pub(super) fn store(&self, cache: &KvCache, first: u64, count: u64) -> Result<(), Failure> {
        let submission = Submission::default();
        let items: Vec<u64> = (first..first + count).collect();
        items.iter().try_for_each(|item| {
            let chunk = StoreChunk {
                chunk: chunk_ref(*item, &items)?,
                blocks: (0..BLOCKS).collect(),
            };
            let submit = || Ok(cache.store(std::slice::from_ref(&chunk))?);
            submission.store(&self.store, *item, submit)
        })
    }

    fn look_up(&self, items: impl Iterator<Item = u64>, expected: usize) -> Result<(), Failure> {
        let keys = items.map(key_of).collect::<Result<Vec<_>, _>>()?;
        let found = self.store.lookup(0, &[0], keys).wait(WAIT_LIMIT)?;
        if found == expected {
            return Ok(());
        }
        Err(Failure::new(format!(
            "lookup found {found} chunks, expected {expected}"
        )))
    }

    /// Removes chunks, so that the store is as large as before.
    fn remove(&self, first: u64, count: u64) -> Result<(), Failure> {
        for item in first..first + count {
            let chunk = find_chunk(&self.directory, (0, 0.into(), key_of(item)?))?;
            let chunk = chunk.ok_or_else(|| Failure::new(format!("chunk {item} is gone")))?;
            chunk.remove()?;
        }
        Ok(())
    }

    /// Ends the store.
    pub(super) fn close(self) -> Result<(), Failure> {
        Ok(self.store.close(WAIT_LIMIT)?)
    }
}

/// Loads chunks one after the other.
fn load(cache: &KvCache, first: u64, count: u64) -> Result<(), Failure> {
    let items: Vec<u64> = (first..first + count).collect();
    let blocks = || (0..BLOCKS).collect();
    items
        .iter()
        .try_for_each(|item| submission::load(cache, &items, *item, blocks()))
}
