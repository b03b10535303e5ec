//! The measurement of one geometry: kvrail, with each engine, and its limits, interleaved.
//!
//! A round stores and then loads all chunks, in waves of as many as KV memory holds. Each wave runs
//! once on each side (kvrail with each engine, bare calls, and others), and which goes first
//! changes. Only that is timed; outside stand: marking the source, syncing, dropping files from the
//! page cache or reading them into it, poisoning the target, comparing what was loaded, removing
//! the files of the round. The first rounds warm up (staging buffers get their pages) and are not
//! counted.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kvrail::io::MountReport;

use super::clients::Sample;
use super::fio::{Fio, Pattern};
use super::kv_memory::KvMemory;
use super::memcpy::Memcpy;
use super::mix::Mix;
use super::page_cache::{drop_from_page_cache, is_resident, read_through};
use super::plan::{LoadSource, Plan};
use super::random::Random;
use super::raw::Raw;
use super::sides::{Round, Side, Sides, in_turn};
use super::subject::Subject;
use crate::failure::Failure;

/// All that was measured of one geometry.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub(crate) plan: Plan,
    pub(crate) file_bytes: usize,
    pub(crate) slots: usize,
    /// What each store says of its path, in the order of the engines.
    pub(crate) mounts: Vec<MountReport>,
    pub(crate) raw_direct: bool,
    /// What fio was told, if it was there.
    pub(crate) fio: Option<Pattern>,
    pub(crate) rounds: Vec<Round>,
    /// Chunks whose bytes were compared, all of them equal, of each store.
    pub(crate) verified: u64,
    /// Submissions that a store had no staging buffer for, and that were repeated.
    pub(crate) retries: Vec<u64>,
}

/// The stores under test with their two KV memories, and the others.
struct Bench {
    load_source: LoadSource,
    mix: Option<f64>,
    directories: Vec<PathBuf>,
    subjects: Vec<Subject>,
    source: KvMemory,
    target: KvMemory,
    raw: Raw,
    memcpy: Option<Memcpy>,
    fio: Option<Fio>,
}

/// Measures one geometry below `directories`, one on each path, which are left with the stores'
/// empty folders.
pub(crate) fn measure(
    plan: Plan,
    directories: &[PathBuf],
    bar: &ProgressBar,
) -> Result<Measurement, Failure> {
    let mut bench = Bench::open(&plan, directories)?;
    let mut rounds = Vec::new();
    let warm_up_rounds = plan.warm_up_rounds();
    for number in 0..warm_up_rounds + plan.rounds {
        let round = bench.round(number, plan.chunks, bar)?;
        if number >= warm_up_rounds {
            rounds.push(round);
        }
    }
    let subjects = &bench.subjects;
    Ok(Measurement {
        file_bytes: bench.raw.file_bytes(),
        slots: bench.source.slots(),
        mounts: subjects
            .iter()
            .map(Subject::close)
            .collect::<Result<_, _>>()?,
        raw_direct: bench.raw.is_direct(),
        fio: bench.fio.as_ref().map(Fio::pattern),
        rounds,
        verified: ((plan.rounds + warm_up_rounds) * plan.chunks) as u64,
        retries: subjects.iter().map(Subject::retries).collect(),
        plan,
    })
}

impl Bench {
    fn open(plan: &Plan, directories: &[PathBuf]) -> Result<Self, Failure> {
        let geometry = plan.geometry;
        let slots = plan.slots();
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
                let paths = each(directories, &format!("store-{index}"));
                Subject::open(plan, *engine, &paths, [&source, &target])
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        let first = subjects.first();
        let first = first.ok_or_else(|| Failure::new("there is no engine to measure"))?;
        let file_bytes = first.file_bytes();
        let raw = Raw::new(
            each(directories, "raw"),
            file_bytes,
            plan.threads,
            plan.direct,
        )?;
        // With several paths there is no fio in the plan.
        let fio = plan.fio.clone().zip(directories.first());
        let fio = fio.map(|(program, directory)| {
            let pattern = Pattern {
                file_bytes,
                threads: plan.threads,
                in_flight: plan.in_flight,
                direct: raw.is_direct(),
            };
            Fio::new(program, directory.join("fio"), pattern)
        });
        let copies = plan.load_source != LoadSource::Disk;
        let payload_bytes = geometry.payload_bytes();
        Ok(Self {
            load_source: plan.load_source,
            mix: plan.mix,
            directories: directories.to_vec(),
            subjects,
            memcpy: copies.then(|| Memcpy::new(&target, payload_bytes, plan.threads)),
            source,
            target,
            raw,
            fio: fio.transpose()?,
        })
    }

    fn round(&mut self, number: usize, chunks: usize, bar: &ProgressBar) -> Result<Round, Failure> {
        // New numbers each round: a chunk that is there already is not stored again.
        let first = (number * chunks) as u64;
        let items: Vec<u64> = (first..first + chunks as u64).collect();
        let waves: Vec<&[u64]> = items.chunks(self.source.slots()).collect();
        let mut round = Round::default();
        let sides = self.sides(&[]);
        for (index, wave) in waves.iter().enumerate() {
            self.mark_source(wave)?;
            for side in in_turn(&sides, number + index) {
                round.store.add(side, self.store(side, wave)?);
                self.sync()?;
            }
            bar.inc(wave.len() as u64);
        }
        let files = self.files()?;
        self.prepare_files(&files)?;
        if matches!(self.load_source, LoadSource::Memory { .. }) {
            self.fill_memory(&waves)?;
        }
        let before: Vec<u64> = self
            .subjects
            .iter()
            .map(Subject::loaded_from_memory)
            .collect();
        let sides = match self.load_source {
            LoadSource::PageCache => self.sides(&[Side::Memcpy]),
            LoadSource::Disk => self.sides(&[]),
            // The raw side copies, and fio has nothing like it.
            LoadSource::Memory { .. } => {
                let mut sides = self.sides(&[]);
                sides.retain(|side| *side != Side::Fio);
                sides
            }
        };
        for (index, wave) in waves.iter().enumerate() {
            self.mark_source(wave)?;
            for side in in_turn(&sides, number + index) {
                self.target.poison()?;
                round.load.add(side, self.load(side, wave)?);
                if matches!(side, Side::Kvrail(_)) {
                    self.compare(wave, |_| true)?;
                }
            }
            bar.inc(wave.len() as u64);
        }
        let subjects = self.subjects.iter().zip(before);
        round.from_memory = subjects
            .map(|(subject, before)| subject.loaded_from_memory() - before)
            .collect();
        if let (Some(share), Some(wave)) = (self.mix, waves.first()) {
            round.mix = self.mix_wave(&Mix::draw(wave, share, number as u64), number)?;
        }
        for path in self.files()? {
            std::fs::remove_file(&path).map_err(|error| Failure::io("remove", &path, &error))?;
        }
        self.sync()?;
        Ok(round)
    }

    /// Loads and stores at the same time, on each side but fio.
    fn mix_wave(&mut self, mix: &Mix, number: usize) -> Result<Sides, Failure> {
        let mut found = Sides::default();
        self.prepare_files(&self.files()?)?;
        self.mark_source(&mix.wave)?;
        let mut sides = self.sides(&[]);
        sides.retain(|side| *side != Side::Fio);
        let cached = self.load_source == LoadSource::PageCache;
        for side in in_turn(&sides, number) {
            let Side::Kvrail(index) = side else {
                found.add(side, self.raw.mix(mix, cached)?);
                self.sync()?;
                continue;
            };
            self.target.poison()?;
            let subject = self.subject(index)?;
            found.add(side, subject.mix(&self.source, &self.target, mix)?);
            self.compare(&mix.wave, |place| mix.is_load(place))?;
            self.sync()?;
        }
        Ok(found)
    }

    /// Returns those that take part in every operation, and `others`.
    fn sides(&self, others: &[Side]) -> Vec<Side> {
        let mut sides: Vec<Side> = (0..self.subjects.len()).map(Side::Kvrail).collect();
        sides.push(Side::Raw);
        sides.extend_from_slice(others);
        sides.extend(self.fio.as_ref().map(|_| Side::Fio));
        sides
    }

    fn store(&mut self, side: Side, wave: &[u64]) -> Result<Sample, Failure> {
        match side {
            Side::Kvrail(index) => self.subject(index)?.store(&self.source, wave),
            Side::Fio => self.fio()?.store(wave),
            Side::Raw | Side::Memcpy => self.raw.store(wave),
        }
    }

    fn load(&mut self, side: Side, wave: &[u64]) -> Result<Sample, Failure> {
        let cached = self.load_source == LoadSource::PageCache;
        match (side, self.load_source) {
            (Side::Kvrail(index), _) => self.subject(index)?.load(&self.target, wave),
            (Side::Fio, _) => self.fio()?.load(wave, cached),
            (Side::Memcpy, _) | (Side::Raw, LoadSource::Memory { .. }) => {
                let memcpy = self.memcpy.as_ref();
                let memcpy = memcpy.ok_or_else(|| Failure::new("there is nothing to copy"))?;
                memcpy.load(&self.target, wave)
            }
            (Side::Raw, LoadSource::PageCache) => self.raw.load_cached(wave),
            (Side::Raw, LoadSource::Disk) => self.raw.load(wave),
        }
    }

    fn subject(&self, index: usize) -> Result<&Subject, Failure> {
        let subject = self.subjects.get(index);
        subject.ok_or_else(|| Failure::new(format!("there is no engine {index}")))
    }

    fn fio(&self) -> Result<&Fio, Failure> {
        let fio = self.fio.as_ref();
        fio.ok_or_else(|| Failure::new("there is no fio"))
    }

    /// Returns the files of all sides.
    fn files(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut files = self.raw.files()?;
        for subject in &self.subjects {
            files.extend(subject.chunk_files()?);
        }
        if let Some(fio) = &self.fio {
            files.extend(fio.files()?);
        }
        Ok(files)
    }

    /// Brings files into the page cache or out of it.
    fn prepare_files(&self, files: &[PathBuf]) -> Result<(), Failure> {
        if self.load_source != LoadSource::PageCache {
            return files.iter().try_for_each(|path| drop_from_page_cache(path));
        }
        files.iter().try_for_each(|path| read_through(path))?;
        // After all were read: the last may have pushed out the first.
        for path in files {
            if !is_resident(path)? {
                let message = "the page cache does not hold the files of a round";
                return Err(Failure::new(message).with_hint("ask for fewer --chunks"));
            }
        }
        Ok(())
    }

    /// Loads everything once: a tier that resists scans does not keep all that was only stored.
    fn fill_memory(&self, waves: &[&[u64]]) -> Result<(), Failure> {
        let subjects = self.subjects.iter();
        let mut pairs = subjects.flat_map(|subject| waves.iter().map(move |wave| (subject, wave)));
        pairs.try_for_each(|(subject, wave)| subject.load(&self.target, wave).map(drop))
    }

    fn sync(&self) -> Result<(), Failure> {
        self.directories
            .iter()
            .try_for_each(|directory| sync_file_system(directory))
    }

    /// Makes the source's slots those of the chunks of a wave.
    fn mark_source(&self, wave: &[u64]) -> Result<(), Failure> {
        wave.iter()
            .enumerate()
            .try_for_each(|(slot, item)| self.source.stamp(slot, *item))
    }

    /// Compares the chunks of a wave that were loaded with what was stored.
    fn compare(&self, wave: &[u64], is_loaded: impl Fn(usize) -> bool) -> Result<(), Failure> {
        for (slot, item) in wave.iter().enumerate() {
            if is_loaded(slot) && !self.target.equals(&self.source, slot)? {
                let message = format!("chunk {item} was loaded with other bytes than stored");
                return Err(Failure::new(message).damaged());
            }
        }
        Ok(())
    }
}

/// Returns the folder of a name in each directory.
pub(crate) fn each(directories: &[PathBuf], name: &str) -> Vec<PathBuf> {
    directories.iter().map(|path| path.join(name)).collect()
}

/// Writes everything back, so that one side's leftovers do not slow the other down.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("sync", path, &error);
    let directory = std::fs::File::open(path).map_err(failed)?;
    rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))
}
