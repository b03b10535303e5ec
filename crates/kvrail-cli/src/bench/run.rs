//! The measurement of one geometry: kvrail, with each engine, and the raw limit, interleaved.
//!
//! A round stores and then loads all chunks, in waves of as many as KV memory holds. Each wave runs
//! once through kvrail with each engine and once raw, and which goes first alternates. Only that is timed; outside
//! stand: marking the source, syncing, dropping files from the page cache, poisoning the target,
//! comparing what was loaded, removing the files of the round. The first round warms up (staging
//! buffers get their pages) and is not counted.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kvrail::config::{EngineChoice, GdsBackend, StoreConfig};
use kvrail::io::MountReport;
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
    /// One store for each, in the order of the report.
    pub(crate) engines: Vec<EngineChoice>,
    pub(crate) in_flight: usize,
    pub(crate) buffer_mib: usize,
    /// Bound of the source and the target together.
    pub(crate) memory_bytes: usize,
}

/// All sides of one operation in one round: kvrail with each engine, and raw.
#[derive(Debug, Default)]
pub(crate) struct Sides {
    pub(crate) kvrail: Vec<Sample>,
    pub(crate) raw: Sample,
}

impl Sides {
    fn new(engines: usize) -> Self {
        Self {
            kvrail: vec![Sample::default(); engines],
            raw: Sample::default(),
        }
    }

    /// Adds what a side took.
    fn add(&mut self, side: usize, sample: Sample) {
        match self.kvrail.get_mut(side) {
            Some(kvrail) => kvrail.add(sample),
            None => self.raw.add(sample),
        }
    }
}

/// One counted round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) store: Sides,
    pub(crate) load: Sides,
}

/// All that was measured of one geometry.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub(crate) plan: Plan,
    pub(crate) file_bytes: usize,
    pub(crate) slots: usize,
    /// What each store says of its path, in the order of the engines.
    pub(crate) mounts: Vec<MountReport>,
    pub(crate) raw_direct: bool,
    pub(crate) rounds: Vec<Round>,
    /// Chunks whose bytes were compared, all of them equal, of each store.
    pub(crate) verified: u64,
    /// Submissions that a store had no staging buffer for, and that were repeated.
    pub(crate) retries: Vec<u64>,
}

/// The stores under test with their two KV memories.
struct Bench {
    subjects: Vec<Subject>,
    source: KvMemory,
    target: KvMemory,
    in_flight: usize,
}

/// A store under test.
struct Subject {
    store: Store,
    directory: PathBuf,
    source_cache: KvCache,
    target_cache: KvCache,
    submission: Submission,
}

/// Measures one geometry below `directory`, which is left with the stores' empty folders.
pub(crate) fn measure(
    plan: Plan,
    directory: &Path,
    bar: &ProgressBar,
) -> Result<Measurement, Failure> {
    let mut bench = Bench::open(&plan, directory)?;
    let first = bench.subjects.first();
    let first = first.ok_or_else(|| Failure::new("there is no engine to measure"))?;
    let file_bytes = first.source_cache.chunk_file_bytes();
    let mut raw = Raw::new(directory.join("raw"), file_bytes, plan.threads)?;
    let mut rounds = Vec::new();
    for number in 0..=plan.rounds {
        let round = bench.round(&mut raw, number, plan.chunks, bar)?;
        if number > 0 {
            rounds.push(round);
        }
    }
    let mut mounts = Vec::new();
    for subject in &bench.subjects {
        let report = subject.store.describe().into_iter().next();
        mounts.push(report.ok_or_else(|| Failure::new("the store reports no mount"))?);
        subject.store.close(WAIT_LIMIT)?;
    }
    let retries = bench.subjects.iter();
    Ok(Measurement {
        file_bytes,
        slots: bench.source.slots(),
        mounts,
        raw_direct: raw.is_direct(),
        rounds,
        verified: ((plan.rounds + 1) * plan.chunks) as u64,
        retries: retries
            .map(|subject| subject.submission.retries())
            .collect(),
        plan,
    })
}

impl Subject {
    fn open(
        plan: &Plan,
        engine: EngineChoice,
        path: &Path,
        memories: [&KvMemory; 2],
    ) -> Result<Self, Failure> {
        let geometry = plan.geometry;
        let config = StoreConfig {
            chunk_size: CHUNK_TOKENS,
            gds_backend: GdsBackend::Posix,
            io_engine: engine,
            disk_io_threads: plan.threads,
            buffer_mib: plan.buffer_mib,
            ..StoreConfig::with_path(path)
        };
        let namespace = Namespace::new(geometry.name, serde_json::Map::new())?;
        let directory = path.join(namespace.directory_name());
        let store = Store::open(&config, namespace, OpenOptions::default())?;
        let attach = |memory: &KvMemory| -> Result<KvCache, Failure> {
            let regions = vec![memory.region()];
            Ok(store.attach(0, 0, memory.layout()?, regions, geometry.blocks_per_chunk())?)
        };
        let [source, target] = memories;
        Ok(Self {
            source_cache: attach(source)?,
            target_cache: attach(target)?,
            store,
            directory,
            submission: Submission::default(),
        })
    }

    fn store(&self, bench: &Bench, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); bench.in_flight], wave, |(), item| {
            let chunk = StoreChunk {
                chunk: chunk_ref(item, wave)?,
                blocks: bench.source.blocks(slot_of(wave, item)),
            };
            let submit = || Ok(self.source_cache.store(std::slice::from_ref(&chunk))?);
            self.submission.store(&self.store, item, submit)
        })
    }

    fn load(&self, bench: &Bench, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); bench.in_flight], wave, |(), item| {
            let blocks = bench.target.blocks(slot_of(wave, item));
            submission::load(&self.target_cache, wave, item, blocks)
        })
    }

    fn chunk_files(&self) -> Result<Vec<PathBuf>, Failure> {
        let files = kvrail::store::inspect::chunks(&self.directory);
        Ok(files
            .map(|file| file.map(|file| file.path))
            .collect::<kvrail::Result<_>>()?)
    }
}

impl Bench {
    fn open(plan: &Plan, directory: &Path) -> Result<Self, Failure> {
        let geometry = plan.geometry;
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
        let engines = plan.engines.iter().enumerate();
        let subjects = engines
            .map(|(index, engine)| {
                let path = directory.join(format!("store-{index}"));
                Subject::open(plan, *engine, &path, [&source, &target])
            })
            .collect::<Result<_, Failure>>()?;
        Ok(Self {
            subjects,
            source,
            target,
            in_flight: plan.in_flight,
        })
    }

    /// Returns who goes when in a wave, by number, the raw side last: each side first in its turn,
    /// so that none always finds the disk as the same other one left it.
    fn order(&self, index: usize) -> Vec<usize> {
        let sides = self.subjects.len() + 1;
        let mut order: Vec<usize> = (0..sides).collect();
        order.rotate_left(index % sides);
        // Forwards and backwards: neighbours change places as well.
        if (index / sides) % 2 == 1 {
            order.reverse();
        }
        order
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
        let mut round = Round {
            store: Sides::new(self.subjects.len()),
            load: Sides::new(self.subjects.len()),
        };
        for (index, wave) in waves.iter().enumerate() {
            self.mark_source(wave)?;
            for side in self.order(number + index) {
                let sample = match self.subjects.get(side) {
                    Some(subject) => subject.store(self, wave)?,
                    None => raw.store(wave)?,
                };
                round.store.add(side, sample);
                self.sync()?;
            }
            bar.inc(wave.len() as u64);
        }
        let mut files: Vec<PathBuf> = items.iter().map(|item| raw.path(*item)).collect();
        for subject in &self.subjects {
            files.extend(subject.chunk_files()?);
        }
        files
            .iter()
            .try_for_each(|path| drop_from_page_cache(path))?;
        for (index, wave) in waves.iter().enumerate() {
            self.mark_source(wave)?;
            for side in self.order(number + index) {
                let Some(subject) = self.subjects.get(side) else {
                    round.load.add(side, raw.load(wave)?);
                    continue;
                };
                self.target.poison()?;
                round.load.add(side, subject.load(self, wave)?);
                self.compare(wave)?;
            }
            bar.inc(wave.len() as u64);
        }
        for path in files {
            std::fs::remove_file(&path).map_err(|error| Failure::io("remove", &path, &error))?;
        }
        self.sync()?;
        Ok(round)
    }

    fn sync(&self) -> Result<(), Failure> {
        let first = self.subjects.first();
        first.map_or(Ok(()), |subject| sync_file_system(&subject.directory))
    }

    /// Makes the source's slots those of the chunks of a wave.
    fn mark_source(&self, wave: &[u64]) -> Result<(), Failure> {
        wave.iter()
            .enumerate()
            .try_for_each(|(slot, item)| self.source.stamp(slot, *item))
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
}

/// Writes everything back, so that one side's leftovers do not slow the other down.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("sync", path, &error);
    let directory = std::fs::File::open(path).map_err(failed)?;
    rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))
}
