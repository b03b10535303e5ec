//! The command line of `kvrail bench`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kvrail::config::EngineChoice;

use super::fio;
use super::geometry::{Geometry, Model};
use super::gpu::{Device, Outermost};
use super::plan::{LoadSource, Plan};
use super::prompts::Wish;
use crate::amount;
use crate::workload::Workload;

/// The arguments of `kvrail bench`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Directory on the file system to measure; works in a new directory in it, removed at the end.
    /// Given several times: one store over all of them
    #[arg(long, required = true)]
    pub(super) path: Vec<PathBuf>,
    /// Whose chunks to store and load
    #[arg(long, value_enum, required_unless_present = "growth")]
    pub(super) model: Option<Model>,
    /// Chunks per round
    #[arg(long, default_value = "32")]
    pub(super) chunks: NonZeroUsize,
    /// Where the KV cache lies: cpu, cuda or cuda:N. On a GPU each way that the store can take there
    /// is measured, and what the GPU does inside its own memory
    #[arg(long, default_value = "cpu")]
    pub(super) device: Device,
    /// Which axis of the KV cache is the outermost in the memory of a GPU
    #[arg(long, value_enum, default_value = "lb")]
    pub(super) layout: Outermost,
    /// The library of cuFile to use on a GPU [default: as `kvrail doctor` finds it]
    #[arg(long, value_name = "PATH", env = "KVRAIL_CUFILE_LIBRARY")]
    pub(super) cufile_library: Option<PathBuf>,
    /// How bytes move from and to the memory of the host; several engines, separated by commas, are
    /// measured in turn in the same rounds
    #[arg(long, value_enum, default_value = "auto", value_delimiter = ',')]
    pub(super) engine: Vec<Engine>,
    /// Threads that do file I/O, of kvrail and of the raw limit alike
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u64).range(1..=256))]
    pub(super) threads: u64,
    /// Counted rounds, after one that is not (with --local-cpu, as many as fill the memory)
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(super) rounds: u64,
    /// Chunks submitted at the same time [default: twice the threads, at most half of the staging
    /// buffers]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub(super) in_flight: Option<u64>,
    /// Staging memory of the store (`cufile_buffer_size`) in MiB
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(super) buffer_mib: u64,
    /// KV memory in MiB, half of it to store from and half to load into; more chunks than fit are
    /// stored and loaded in waves
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(super) memory_mib: u64,
    /// Where the bytes of loads are: cold is on disk and not in the page cache, warm in the page
    /// cache. When warm, the raw side reads from there as well, and plain copies are measured too
    #[arg(long, value_enum, default_value = "cold")]
    pub(super) cache: CacheState,
    /// Load from a DRAM tier of so many GB (`local_cpu`, `max_local_cpu_size`); the raw side copies
    /// as many bytes by as many threads
    #[arg(long, value_name = "GB", conflicts_with = "cache", value_parser = gigabytes)]
    pub(super) local_cpu: Option<f64>,
    /// Have that tier in memory that processes share (`local_cpu_shared`), in a directory on a tmpfs
    #[arg(
        long,
        value_name = "DIRECTORY",
        requires = "local_cpu",
        conflicts_with = "prompts"
    )]
    pub(super) local_cpu_shared: Option<PathBuf>,
    /// Also measure loads and stores at the same time; SHARE of the chunks is loaded, 0 to 1
    #[arg(long, value_name = "SHARE", conflicts_with = "local_cpu", value_parser = share)]
    pub(super) mix: Option<f64>,
    /// Instead, answer made-up prompts as a server does: look up, load what is there, store the rest,
    /// on all sides
    #[arg(long, value_enum, value_name = "WORKLOAD",
          conflicts_with_all = ["cache", "mix", "chunks", "growth"], requires = "model")]
    pub(super) prompts: Option<Workload>,
    /// Prompts of a round
    #[arg(long, default_value = "64", requires = "prompts",
          value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(super) requests: u64,
    /// `max_size` of the store of prompts on each path, so that chunks are evicted [default: none]
    #[arg(long, value_name = "SIZE", requires = "prompts", value_parser = amount::size)]
    pub(super) max_size: Option<u64>,
    /// Whether files are opened with O_DIRECT, on all sides; auto: where it works
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) direct_io: DirectIo,
    /// The fio to measure as well, with the same files, threads and depth, where there is one
    #[arg(long, value_name = "PROGRAM", default_value = "fio")]
    pub(super) fio: PathBuf,
    /// Measure without fio
    #[arg(long)]
    pub(super) no_fio: bool,
    /// Also (or only, without --model) measure stores with so many chunks each, separated by commas:
    /// opening, its memory, lookup, store and load
    #[arg(long, value_name = "CHUNKS", value_delimiter = ',',
          value_parser = clap::value_parser!(u64).range(512..=100_000_000))]
    pub(super) growth: Vec<u64>,
    /// Print JSON instead of the table, or write it to FILE and print the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(super) json: Option<PathBuf>,
    /// Also write a page with plots to FILE, which needs no other file and no network
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Read /proc, /sys, /run and /dev below this folder, for tests.
    #[arg(long, hide = true, default_value = "/")]
    pub(super) system_root: PathBuf,
}

/// The I/O engines that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Engine {
    /// What the store takes by itself
    Auto,
    /// A pool of threads with pread and pwrite
    Posix,
    /// io_uring
    Uring,
}

/// What of the files is in the page cache before a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CacheState {
    /// Nothing
    Cold,
    /// Everything
    Warm,
}

/// Whether to use O_DIRECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DirectIo {
    /// Where it works
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

impl DirectIo {
    fn choice(self) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::On => Some(true),
            Self::Off => Some(false),
        }
    }
}

impl Engine {
    pub(super) fn choice(self) -> EngineChoice {
        match self {
            Self::Auto => EngineChoice::Auto,
            Self::Posix => EngineChoice::Posix,
            Self::Uring => EngineChoice::Uring,
        }
    }
}

/// Most GB of a DRAM tier that can be asked for: more than any machine has.
const GIGABYTES_MAX: f64 = 1e6;

fn gigabytes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= GIGABYTES_MAX => Ok(number),
        _ => Err(format!("expected a number of GB up to {GIGABYTES_MAX}")),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

impl Arguments {
    /// Returns what to measure of a geometry, with `fio` as well if there is one.
    pub(super) fn plan(&self, geometry: Geometry, fio: Option<fio::Program>) -> Plan {
        let threads = self.threads as usize;
        let buffer_bytes = (self.buffer_mib as usize) << 20;
        // Half of the staging buffers: the store keeps some for loads and would drop chunks beyond.
        let fitting = (buffer_bytes / geometry.payload_bytes() / 2).max(1);
        let in_flight = self.in_flight.map(|count| count as usize);
        let load_source = match (self.local_cpu, self.cache) {
            (Some(gigabytes), _) => LoadSource::Memory {
                gigabytes,
                is_shared: self.local_cpu_shared.is_some(),
            },
            (None, CacheState::Warm) => LoadSource::PageCache,
            (None, CacheState::Cold) => LoadSource::Disk,
        };
        Plan {
            geometry,
            chunks: self.chunks.get(),
            rounds: self.rounds as usize,
            threads,
            engines: self.engine.iter().map(|one| one.choice()).collect(),
            in_flight: in_flight.unwrap_or_else(|| fitting.min(2 * threads)),
            buffer_mib: self.buffer_mib as usize,
            memory_bytes: (self.memory_mib as usize) << 20,
            load_source,
            shared_memory: None,
            direct: self.direct_io.choice(),
            mix: self.mix,
            fio,
        }
    }

    /// Returns which prompts to answer, if that is asked for.
    pub(super) fn prompts(&self) -> Option<Wish> {
        Some(Wish {
            workload: self.prompts?,
            requests: self.requests as usize,
            max_size: self.max_size,
        })
    }

    /// Returns the first of the directories; there is one.
    pub(super) fn first_path(&self) -> &Path {
        self.path.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Returns whose chunks to measure.
    pub(super) fn geometries(&self) -> Vec<Geometry> {
        self.model.map_or_else(Vec::new, Model::geometries)
    }

    /// Returns the option that only loads into and stores from the memory of the host can have, if
    /// one was given.
    pub(super) fn host_only_option(&self) -> Option<&'static str> {
        let options = [
            (self.cache == CacheState::Warm, "--cache warm"),
            (self.local_cpu.is_some(), "--local-cpu"),
            (!self.growth.is_empty(), "--growth"),
            (self.mix.is_some(), "--mix"),
            (self.prompts.is_some(), "--prompts"),
            (self.path.len() > 1, "more than one --path"),
            (self.html.is_some(), "--html"),
            (self.direct_io != DirectIo::Auto, "--direct-io"),
        ];
        let given = options.into_iter().find(|(is_given, _)| *is_given);
        given.map(|(_, name)| name)
    }
}
