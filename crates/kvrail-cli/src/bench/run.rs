//! The measurement of one geometry: kvrail and the raw limit, interleaved.
//!
//! A round stores and then loads all chunks, in waves of as many as KV memory holds. Each wave runs
//! once through kvrail and once raw, and which goes first alternates. Only that is timed; outside
//! stand: marking the source, syncing, dropping files from the page cache, poisoning the target,
//! comparing what was loaded, removing the files of the round. The first round warms up (staging
//! buffers get their pages) and is not counted.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::{KvCache, Namespace, OpenOptions, Store, StoreChunk};

use super::clients::{self, Sample};
use super::geometry::{CHUNK_TOKENS, Geometry};
use super::kv_memory::KvMemory;
use super::random::Random;
use super::raw::{Raw, drop_from_page_cache};
use super::submission::{self, Submission, WAIT_LIMIT, chunk_ref, slot_of};
use crate::failure::Failure;

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
    submission: Submission,
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
        retries: bench.submission.retries(),
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
            submission: Submission::default(),
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
            let chunk = StoreChunk {
                chunk: chunk_ref(item, wave)?,
                blocks: self.source.blocks(slot_of(wave, item)),
            };
            let submit = || Ok(self.source_cache.store(std::slice::from_ref(&chunk))?);
            self.submission.store(&self.store, item, submit)
        })
    }

    fn load_wave(&self, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            let blocks = self.target.blocks(slot_of(wave, item));
            submission::load(&self.target_cache, wave, item, blocks)
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

/// Writes everything back, so that one side's leftovers do not slow the other down.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("sync", path, &error);
    let directory = std::fs::File::open(path).map_err(failed)?;
    rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))
}
