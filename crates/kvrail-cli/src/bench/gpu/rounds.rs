//! The measurement of one geometry on a GPU: each way of the store, and what bounds it, in turns.
//!
//! A round times the copies inside the GPU, stores all chunks and loads them, in waves of as many
//! as KV memory holds. Each wave runs once on each side, beginning with another one each time. Only
//! that is timed; outside stand: sending sources and poison, syncing, dropping files from the page
//! cache, comparing what was loaded, removing the files of the round. The first round warms up and
//! is not counted.

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kvrail::OpenOptions;
use kvrail::io::MountReport;
use kvrail::memory::{CopyMethod, Gpu};

use super::super::clients::Sample;
use super::super::page_cache::drop_from_page_cache;
use super::super::plan::Plan;
use super::super::raw::Raw;
use super::super::run::sync_file_system;
use super::bare_cufile::{BareCufile, calls};
use super::copies::{Copies, Timing, Work};
use super::kv_memory::{GpuKvMemory, Outermost};
use super::path::{StorePath, Way};
use super::pinned_copy::{Direction, PinnedCopy};
use crate::failure::Failure;

/// Who is measured at moving chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The store on one of its ways.
    Store(Way),
    /// Bare system calls on the same file system.
    Disk,
    /// Copies between VRAM and pinned memory.
    Pinned,
    /// Bare calls of cuFile, each of them as long as may be.
    Cufile,
    /// Bare calls of cuFile, one for each block.
    CufileBlocks,
}

/// What one side took at one operation of one round.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) side: Side,
    pub(crate) sample: Sample,
    /// Milliseconds that a store held the compute stream.
    pub(crate) held_milliseconds: f64,
}

/// One counted round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) copies: Vec<(Work, CopyMethod, Timing)>,
    pub(crate) store: Vec<Measured>,
    pub(crate) load: Vec<Measured>,
}

/// All that was measured of one geometry.
pub(crate) struct Measurement {
    pub(crate) plan: Plan,
    pub(crate) file_bytes: usize,
    pub(crate) slots: usize,
    pub(crate) method: CopyMethod,
    pub(crate) method_reason: String,
    pub(crate) mounts: Vec<(Way, MountReport)>,
    /// What was not measured, and why.
    pub(crate) skipped: Vec<(String, String)>,
    pub(crate) raw_direct: bool,
    pub(crate) rounds: Vec<Round>,
    /// Chunks whose bytes were compared, all of them equal.
    pub(crate) verified: u64,
    pub(crate) retries: u64,
}

/// What is fixed over all geometries.
pub(crate) struct Setting<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) outermost: Outermost,
    /// How stores are opened.
    pub(crate) options: &'a OpenOptions,
}

/// Everything that takes part.
struct Bench<'a> {
    gpu: &'a Gpu,
    memory: GpuKvMemory,
    copies: Copies,
    methods: Vec<CopyMethod>,
    paths: Vec<StorePath>,
    pinned: PinnedCopy,
    disk: Raw,
    /// Bare calls of cuFile: [`Side::Cufile`] and [`Side::CufileBlocks`].
    bare: Vec<(Side, BareCufile)>,
    directory: PathBuf,
    verified: u64,
}

/// Measures one geometry below `directory`, which is left with the stores' empty folders.
pub(crate) fn measure(
    plan: Plan,
    setting: &Setting<'_>,
    directory: &Path,
    bar: &ProgressBar,
) -> Result<Measurement, Failure> {
    let mut skipped = Vec::new();
    let mut bench = Bench::open(&plan, setting, directory, &mut skipped)?;
    let mut rounds = Vec::new();
    for number in 0..=plan.rounds {
        let round = bench.round(number, plan.chunks, bar)?;
        if number > 0 {
            rounds.push(round);
        }
    }
    for path in &bench.paths {
        if let Some(reason) = path.left_its_way() {
            let message = format!("the store left its way {}: {reason}", path.way().name());
            return Err(Failure::new(message).with_hint("its numbers would be another way's"));
        }
    }
    let mounts = bench
        .paths
        .iter()
        .map(|path| Ok((path.way(), path.mount()?)))
        .collect::<Result<_, Failure>>()?;
    let measurement = Measurement {
        file_bytes: file_bytes(&bench.paths),
        slots: bench.memory.slots(),
        method: setting.gpu.method(),
        method_reason: setting.gpu.reason().to_owned(),
        mounts,
        skipped,
        raw_direct: bench.disk.is_direct(),
        rounds,
        verified: bench.verified,
        retries: bench.paths.iter().map(StorePath::retries).sum(),
        plan,
    };
    bench.paths.into_iter().try_for_each(StorePath::close)?;
    Ok(measurement)
}

fn file_bytes(paths: &[StorePath]) -> usize {
    paths.first().map_or(0, StorePath::chunk_file_bytes)
}

impl<'a> Bench<'a> {
    fn open(
        plan: &Plan,
        setting: &Setting<'a>,
        directory: &Path,
        skipped: &mut Vec<(String, String)>,
    ) -> Result<Self, Failure> {
        let (gpu, geometry) = (setting.gpu, plan.geometry);
        // Half for what is stored, half for what is loaded.
        let slots = (plan.memory_bytes / 2 / geometry.payload_bytes()).min(plan.chunks);
        if slots == 0 {
            let message = format!("--memory-mib holds no two chunks of {}", geometry.name);
            return Err(Failure::new(message).with_hint("give more, at least 64 for each model"));
        }
        let memory = GpuKvMemory::new(gpu, geometry, setting.outermost, slots)?;
        let ways: &[Way] = match setting.outermost {
            Outermost::Layer => &[Way::Posix, Way::Cufile],
            Outermost::Block => &[Way::Posix, Way::Cufile, Way::Direct],
        };
        let mut paths = Vec::new();
        for way in ways {
            match StorePath::open(*way, plan, &memory, setting, directory)? {
                Ok(path) => paths.push(path),
                Err(reason) => skipped.push((way.name().to_owned(), reason)),
            }
        }
        let blocks = geometry.blocks_per_chunk();
        let bytes = file_bytes(&paths);
        let disk = Raw::new(vec![directory.join("raw")], bytes, plan.threads, None)?;
        let copies = Copies::new(gpu, &memory, blocks)?;
        let mut bare = Vec::new();
        let mut add_bare = |side: Side, name: &str, calls| -> Result<(), Failure> {
            let folder = directory.join(name);
            let (libraries, direct) = (&setting.options.libraries.cufile, disk.is_direct());
            let cufile = BareCufile::new(libraries, gpu, folder, direct, calls, plan.threads)?;
            bare.push((side, cufile));
            Ok(())
        };
        if paths.iter().any(|path| path.way().uses_cufile()) {
            add_bare(Side::Cufile, "bare", calls(0..bytes).collect())?;
        }
        if paths.iter().any(|path| path.way() == Way::Direct) {
            let format = copies.format();
            let (start, step) = (format.payload_offset(), geometry.payload_bytes() / blocks);
            let block = |number| start + number * step..start + (number + 1) * step;
            let whole = (0..blocks).flat_map(|number| calls(block(number)));
            let rest = calls(format.payload_offset() + geometry.payload_bytes()..bytes);
            add_bare(
                Side::CufileBlocks,
                "bare-blocks",
                calls(0..start).chain(whole).chain(rest).collect(),
            )?;
        }
        let mut bench = Self {
            gpu,
            copies,
            methods: Vec::new(),
            pinned: PinnedCopy::new(gpu, &memory, blocks)?,
            bare,
            disk,
            memory,
            paths,
            directory: directory.to_path_buf(),
            verified: 0,
        };
        bench.find_methods(skipped);
        Ok(bench)
    }

    /// Finds out which ways of copying pieces this device and driver have.
    fn find_methods(&mut self, skipped: &mut Vec<(String, String)>) {
        for method in CopyMethod::ALL {
            let work = match method {
                CopyMethod::HashingKernel => Work::GatherHash,
                _ => Work::Gather,
            };
            match self.copies.time(work, method) {
                Ok(_) => self.methods.push(method),
                Err(error) => skipped.push((format!("gather by {method}"), error.to_string())),
            }
        }
        if self.gpu.kernels().is_none() {
            let reason = self.gpu.reason().to_owned();
            skipped.push(("page hashes by the GPU".to_owned(), reason));
        }
    }

    fn round(&mut self, number: usize, chunks: usize, bar: &ProgressBar) -> Result<Round, Failure> {
        // New numbers each round: a chunk that is there already is not stored again.
        let first = (number * chunks) as u64;
        let items: Vec<u64> = (first..first + chunks as u64).collect();
        let waves: Vec<&[u64]> = items.chunks(self.memory.slots()).collect();
        let mut round = Round {
            copies: self.time_copies(number)?,
            ..Round::default()
        };
        for (index, wave) in waves.iter().enumerate() {
            self.memory.send_sources(wave)?;
            for side in self.sides(number + index) {
                let (sample, held) = self.store(side, wave)?;
                add(&mut round.store, side, sample, held);
                sync_file_system(&self.directory)?;
            }
            bar.inc(wave.len() as u64);
        }
        let files = self.files(&items)?;
        files
            .iter()
            .try_for_each(|path| drop_from_page_cache(path))?;
        for (index, wave) in waves.iter().enumerate() {
            self.memory.send_sources(wave)?;
            for side in self.sides(number + index) {
                let sample = self.load(side, wave)?;
                add(&mut round.load, side, sample, 0.0);
            }
            bar.inc(wave.len() as u64);
        }
        for path in files {
            std::fs::remove_file(&path).map_err(|error| Failure::io("remove", &path, &error))?;
        }
        sync_file_system(&self.directory)?;
        Ok(round)
    }

    /// Times each piece of work by each method, the plain copy in between.
    fn time_copies(&self, number: usize) -> Result<Vec<(Work, CopyMethod, Timing)>, Failure> {
        let mut times = Vec::new();
        let mut methods = self.methods.clone();
        let turn = number % methods.len().max(1);
        methods.rotate_left(turn);
        for method in methods {
            for work in [Work::Plain].into_iter().chain(Work::ALL) {
                let is_possible = !work.hashes() || self.gpu.kernels().is_some();
                if is_possible && work.is_by(method) {
                    times.push((work, method, self.copies.time(work, method)?));
                }
            }
        }
        Ok(times)
    }

    /// Returns who is measured, in the order of a wave.
    fn sides(&self, turn: usize) -> Vec<Side> {
        let stores = self.paths.iter().map(|path| Side::Store(path.way()));
        let bare = self.bare.iter().map(|(side, _)| *side);
        let mut sides: Vec<Side> = stores
            .chain(bare)
            .chain([Side::Disk, Side::Pinned])
            .collect();
        let turn = turn % sides.len();
        sides.rotate_left(turn);
        sides
    }

    fn path(&self, way: Way) -> Result<&StorePath, Failure> {
        let path = self.paths.iter().find(|path| path.way() == way);
        path.ok_or_else(|| Failure::new(format!("no store goes the way {}", way.name())))
    }

    fn bare(&mut self, side: Side) -> Result<&mut BareCufile, Failure> {
        let bare = self.bare.iter_mut().find(|(found, _)| *found == side);
        let (_, bare) = bare.ok_or_else(|| Failure::new(format!("{side:?} is not open")))?;
        Ok(bare)
    }

    fn store(&mut self, side: Side, wave: &[u64]) -> Result<(Sample, f64), Failure> {
        let sample = match side {
            Side::Store(way) => return self.path(way)?.store(&self.memory, wave),
            Side::Cufile | Side::CufileBlocks => self.bare(side)?.store(wave)?,
            Side::Pinned => self.pinned.run(Direction::ToHost, wave.len())?,
            Side::Disk => self.disk.store(wave)?,
        };
        Ok((sample, 0.0))
    }

    fn load(&mut self, side: Side, wave: &[u64]) -> Result<Sample, Failure> {
        match side {
            Side::Store(way) => {
                self.memory.send_poison()?;
                let sample = self.path(way)?.load(&self.memory, wave)?;
                self.memory.check(wave)?;
                self.verified += wave.len() as u64;
                Ok(sample)
            }
            Side::Cufile | Side::CufileBlocks => self.bare(side)?.load(wave),
            Side::Pinned => self.pinned.run(Direction::ToGpu, wave.len()),
            Side::Disk => self.disk.load(wave),
        }
    }

    /// Returns all files of a round.
    fn files(&self, items: &[u64]) -> Result<Vec<PathBuf>, Failure> {
        let mut files = Vec::new();
        for path in &self.paths {
            files.extend(path.chunk_files()?);
        }
        files.extend(items.iter().map(|item| self.disk.path(*item)));
        for (_, bare) in &self.bare {
            files.extend(items.iter().map(|item| bare.path(*item)));
        }
        Ok(files)
    }
}

/// Adds a wave to what a side took in this round.
fn add(measured: &mut Vec<Measured>, side: Side, sample: Sample, held_milliseconds: f64) {
    match measured.iter_mut().find(|found| found.side == side) {
        Some(found) => {
            found.sample.add(sample);
            found.held_milliseconds += held_milliseconds;
        }
        None => measured.push(Measured {
            side,
            sample,
            held_milliseconds,
        }),
    }
}
