//! The measurement of one geometry: kvrail and the raw limit, interleaved.
//!
//! A round stores and then loads all chunks, in waves of as many as KV memory holds. Each wave runs
//! once through kvrail and once raw, and which goes first alternates. Only that is timed; outside
//! stand: marking the source, syncing, dropping files from the page cache, poisoning the target,
//! comparing what was loaded, removing the files of the round. The first round warms up (staging
//! buffers get their pages) and is not counted.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::ProgressBar;
use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::{ChunkKey, ChunkRef, KvCache, LoadChunk, Namespace, OpenOptions, Store, StoreChunk};

use super::clients::{self, Sample};
use super::geometry::{CHUNK_TOKENS, Geometry};
use super::kv_memory::KvMemory;
use super::random::Random;
use super::raw::{Raw, drop_from_page_cache};
use crate::failure::Failure;

/// Longest wait for one chunk; far above any time worth reporting.
const WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How long a client waits before it submits a chunk again that the store had no room for.
const RETRY_PAUSE: Duration = Duration::from_millis(1);
/// Most times a chunk is submitted again: half a minute of pauses, when no store takes so long.
const RETRIES_MAX: u64 = 30_000;

/// What to measure.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) chunks: usize,
    pub(crate) rounds: usize,
    pub(crate) threads: usize,
    pub(crate) in_flight: usize,
    pub(crate) buffer_mib: usize,
    /// Bound of the source and the target together.
    pub(crate) memory_bytes: usize,
}

/// Both sides of one operation in one round.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    pub(crate) kvrail: Sample,
    pub(crate) raw: Sample,
}

/// One counted round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) store: Pair,
    pub(crate) load: Pair,
}

/// All that was measured of one geometry.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub(crate) plan: Plan,
    pub(crate) file_bytes: usize,
    pub(crate) slots: usize,
    pub(crate) engine: &'static str,
    pub(crate) file_system: String,
    pub(crate) kvrail_direct: bool,
    pub(crate) raw_direct: bool,
    pub(crate) rounds: Vec<Round>,
    /// Chunks whose bytes were compared, all of them equal.
    pub(crate) verified: u64,
    /// Submissions that the store had no staging buffer for, and that were repeated.
    pub(crate) retries: u64,
}

/// The store under test with its two KV memories.
struct Bench {
    store: Store,
    directory: PathBuf,
    source: KvMemory,
    target: KvMemory,
    source_cache: KvCache,
    target_cache: KvCache,
    in_flight: usize,
    /// vLLM submits from one thread, so the gather of two chunks never overlaps.
    submission: Mutex<()>,
    retries: AtomicU64,
}

/// Measures one geometry below `directory`, which is left with the store's empty folders.
pub(crate) fn measure(
    plan: Plan,
    directory: &Path,
    bar: &ProgressBar,
) -> Result<Measurement, Failure> {
    let mut bench = Bench::open(&plan, directory)?;
    let file_bytes = bench.source_cache.chunk_file_bytes();
    let mut raw = Raw::new(directory.join("raw"), file_bytes, plan.threads)?;
    let mut rounds = Vec::new();
    for number in 0..=plan.rounds {
        let round = bench.round(&mut raw, number, plan.chunks, bar)?;
        if number > 0 {
            rounds.push(round);
        }
    }
    let report = bench.store.describe().into_iter().next();
    let report = report.ok_or_else(|| Failure::new("the store reports no mount"))?;
    bench.store.close(WAIT_LIMIT)?;
    Ok(Measurement {
        file_bytes,
        slots: bench.source.slots(),
        engine: report.engine,
        file_system: report.file_system,
        kvrail_direct: report.direct,
        raw_direct: raw.is_direct(),
        rounds,
        verified: ((plan.rounds + 1) * plan.chunks) as u64,
        retries: bench.retries.into_inner(),
        plan,
    })
}

impl Bench {
    fn open(plan: &Plan, directory: &Path) -> Result<Self, Failure> {
        let geometry = plan.geometry;
        let path = directory.join("store");
        let config = StoreConfig {
            chunk_size: CHUNK_TOKENS,
            gds_backend: GdsBackend::Posix,
            disk_io_threads: plan.threads,
            buffer_mib: plan.buffer_mib,
            ..StoreConfig::with_path(&path)
        };
        let namespace = Namespace::new(geometry.name, serde_json::Map::new())?;
        let directory = path.join(namespace.directory_name());
        let store = Store::open(&config, namespace, OpenOptions::default())?;
        // Half for what is stored, half for what is loaded.
        let fitting = plan.memory_bytes / 2 / geometry.payload_bytes();
        let slots = fitting.min(plan.chunks);
        if slots == 0 {
            let message = format!("--memory-mib holds no two chunks of {}", geometry.name);
            return Err(Failure::new(message).with_hint("give more, at least 64 for each model"));
        }
        let source = KvMemory::new(geometry, slots)?;
        let target = KvMemory::new(geometry, slots)?;
        source.fill(&mut Random::new(0x6b76_7261_696c))?;
        let attach = |memory: &KvMemory| -> Result<KvCache, Failure> {
            let regions = vec![memory.region()];
            Ok(store.attach(0, 0, memory.layout()?, regions, geometry.blocks_per_chunk())?)
        };
        Ok(Self {
            source_cache: attach(&source)?,
            target_cache: attach(&target)?,
            store,
            directory,
            source,
            target,
            in_flight: plan.in_flight,
            submission: Mutex::new(()),
            retries: AtomicU64::new(0),
        })
    }

    fn round(
        &mut self,
        raw: &mut Raw,
        number: usize,
        chunks: usize,
        bar: &ProgressBar,
    ) -> Result<Round, Failure> {
        // New numbers each round: a chunk that is there already is not stored again.
        let first = (number * chunks) as u64;
        let items: Vec<u64> = (first..first + chunks as u64).collect();
        let waves: Vec<&[u64]> = items.chunks(self.source.slots()).collect();
        let mut round = Round::default();
        for (index, wave) in waves.iter().enumerate() {
            self.mark_source(wave)?;
            for side in order(number + index) {
                match side {
                    Side::Kvrail => round.store.kvrail.add(self.store_wave(wave)?),
                    Side::Raw => round.store.raw.add(raw.store(wave)?),
                }
                sync_file_system(&self.directory)?;
            }
            bar.inc(wave.len() as u64);
        }
        let files = self.chunk_files()?;
        for path in files
            .iter()
            .cloned()
            .chain(items.iter().map(|item| raw.path(*item)))
        {
            drop_from_page_cache(&path)?;
        }
        for (index, wave) in waves.iter().enumerate() {
            self.target.poison()?;
            for side in order(number + index) {
                match side {
                    Side::Kvrail => round.load.kvrail.add(self.load_wave(wave)?),
                    Side::Raw => round.load.raw.add(raw.load(wave)?),
                }
            }
            self.mark_source(wave)?;
            self.compare(wave)?;
            bar.inc(wave.len() as u64);
        }
        for path in files
            .into_iter()
            .chain(items.iter().map(|item| raw.path(*item)))
        {
            std::fs::remove_file(&path).map_err(|error| Failure::io("remove", &path, &error))?;
        }
        sync_file_system(&self.directory)?;
        Ok(round)
    }

    /// Makes the source's slots those of the chunks of a wave.
    fn mark_source(&self, wave: &[u64]) -> Result<(), Failure> {
        wave.iter()
            .enumerate()
            .try_for_each(|(slot, item)| self.source.stamp(slot, *item))
    }

    fn store_wave(&self, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            let blocks = self.source.blocks(slot_of(wave, item));
            let chunk = StoreChunk {
                chunk: chunk_ref(item, wave)?,
                blocks,
            };
            for _ in 0..=RETRIES_MAX {
                let ticket = {
                    let turn = self.submission.lock();
                    let _turn = turn.unwrap_or_else(|poisoned| poisoned.into_inner());
                    self.source_cache.store(std::slice::from_ref(&chunk))?
                };
                let report = ticket.wait(WAIT_LIMIT)?;
                if report.stored == 1 {
                    return Ok(());
                }
                if report.dropped == 0 {
                    return Err(self.store_failure(item));
                }
                self.retries.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(RETRY_PAUSE);
            }
            Err(self.store_failure(item))
        })
    }

    /// Says why a chunk was not stored, as far as the store's notices tell.
    fn store_failure(&self, item: u64) -> Failure {
        let notices = self.store.take_notices();
        let reasons: Vec<String> = notices.into_iter().map(|notice| notice.message).collect();
        Failure::new(format!(
            "chunk {item} was not stored: {}",
            reasons.join("; ")
        ))
        .with_hint("see whether --path has room and can be written to")
    }

    fn load_wave(&self, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            let blocks = self.target.blocks(slot_of(wave, item));
            let chunk = LoadChunk {
                chunk: chunk_ref(item, wave)?,
                first_block: 0,
                blocks,
            };
            let report = self.target_cache.load(vec![chunk])?.wait(WAIT_LIMIT)?;
            if report.loaded == 1 {
                return Ok(());
            }
            let reasons = report.errors.join("; ");
            Err(Failure::new(format!("chunk {item} was not loaded: {reasons}")).damaged())
        })
    }

    fn compare(&self, wave: &[u64]) -> Result<(), Failure> {
        for (slot, item) in wave.iter().enumerate() {
            if !self.target.equals(&self.source, slot)? {
                let message = format!("chunk {item} was loaded with other bytes than stored");
                return Err(Failure::new(message).damaged());
            }
        }
        Ok(())
    }

    fn chunk_files(&self) -> Result<Vec<PathBuf>, Failure> {
        let files = kvrail::store::inspect::chunks(&self.directory);
        Ok(files
            .map(|file| file.map(|file| file.path))
            .collect::<kvrail::Result<_>>()?)
    }
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Kvrail,
    Raw,
}

/// Returns who goes first in a wave: each side every other time, so that neither always finds the
/// disk as the other left it.
fn order(index: usize) -> [Side; 2] {
    if index.is_multiple_of(2) {
        [Side::Kvrail, Side::Raw]
    } else {
        [Side::Raw, Side::Kvrail]
    }
}

/// Returns a chunk's slot: its place in its wave, whose items are consecutive numbers.
fn slot_of(wave: &[u64], item: u64) -> usize {
    let first = wave.first().copied().unwrap_or(item);
    (item - first) as usize
}

/// Returns a chunk's key; its parent is the chunk before it, as in a prompt that fills a wave.
fn chunk_ref(item: u64, wave: &[u64]) -> Result<ChunkRef, Failure> {
    let parent = if slot_of(wave, item) == 0 {
        None
    } else {
        Some(key_of(item - 1)?)
    };
    Ok(ChunkRef {
        key: key_of(item)?,
        parent,
    })
}

/// Returns a chunk key that is as evenly distributed as a hash.
pub(crate) fn key_of(item: u64) -> Result<ChunkKey, Failure> {
    let mut bytes = [0; 32];
    Random::new(item).fill(&mut bytes);
    Ok(ChunkKey::from_bytes(&bytes)?)
}

/// Writes everything back, so that one side's leftovers do not slow the other down.
fn sync_file_system(path: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("sync", path, &error);
    let directory = std::fs::File::open(path).map_err(failed)?;
    rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))
}
