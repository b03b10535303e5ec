//! `kvrail bench`: what the store does on a directory, against what the directory can do.
//!
//! Chunks of a model's geometry are stored, loaded (from disk, not from the page cache) and
//! compared; in the same run, interleaved, the same files are written and read with bare system
//! calls. Caches below the file system (a disk's, a hypervisor's, a server's) are out of reach.

mod clients;
mod geometry;
mod gpu;
mod kv_memory;
mod lookup;
mod random;
mod raw;
mod report;
mod run;
mod scratch;
mod statistics;
mod submission;

use std::fs::File;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use kvrail::config::EngineChoice;
use serde::Serialize;

use self::geometry::{Geometry, Model};
use self::gpu::{Device, Outermost};
pub(crate) use self::random::Random;
use self::report::{ModelReport, Report};
use self::run::Plan;
use self::scratch::Scratch;
pub(crate) use self::scratch::{CLEANUP_COMMAND, CleanupArguments, clean_up};
use crate::failure::Failure;
use crate::output::{human_bytes, progress_bar, write_json};

/// The arguments of `kvrail bench`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Directory on the file system to measure; works in a new directory in it, removed at the end
    #[arg(long)]
    path: PathBuf,
    /// Whose chunks to store and load
    #[arg(long, value_enum)]
    model: Model,
    /// Chunks per round
    #[arg(long, default_value = "32")]
    chunks: NonZeroUsize,
    /// Where the KV cache lies: cpu, cuda or cuda:N. On a GPU each way that the store can take there
    /// is measured, and what the GPU does inside its own memory
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Which axis of the KV cache is the outermost in the memory of a GPU
    #[arg(long, value_enum, default_value = "lb")]
    layout: Outermost,
    /// The library of cuFile to use on a GPU [default: as `kvrail doctor` finds it]
    #[arg(long, value_name = "PATH", env = "KVRAIL_CUFILE_LIBRARY")]
    cufile_library: Option<PathBuf>,
    /// How bytes move from and to the memory of the host; several engines, separated by commas, are
    /// measured in turn in the same rounds
    #[arg(long, value_enum, default_value = "auto", value_delimiter = ',')]
    engine: Vec<Engine>,
    /// Threads that do file I/O, of kvrail and of the raw limit alike
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u64).range(1..=256))]
    threads: u64,
    /// Counted rounds, after one that is not
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Chunks submitted at the same time [default: twice the threads, at most half of the staging
    /// buffers]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    in_flight: Option<u64>,
    /// Staging memory of the store (`cufile_buffer_size`) in MiB
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    buffer_mib: u64,
    /// KV memory in MiB, half of it to store from and half to load into; more chunks than fit are
    /// stored and loaded in waves
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    memory_mib: u64,
    /// Print JSON instead of the table, or write it to FILE and print the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Read /proc, /sys, /run and /dev below this folder, for tests.
    #[arg(long, hide = true, default_value = "/")]
    system_root: PathBuf,
}

/// The I/O engines that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    /// What the store takes by itself
    Auto,
    /// A pool of threads with pread and pwrite
    Posix,
    /// io_uring
    Uring,
}

impl Engine {
    fn choice(self) -> EngineChoice {
        match self {
            Self::Auto => EngineChoice::Auto,
            Self::Posix => EngineChoice::Posix,
            Self::Uring => EngineChoice::Uring,
        }
    }
}

/// Measures and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if let Device::Cuda(ordinal) = arguments.device {
        return gpu::run(arguments, ordinal);
    }
    let geometries = arguments.model.geometries();
    let scratch = Scratch::new(&arguments.path)?;
    // All sides' files of one round.
    let sides = arguments.engine.len() as u64 + 1;
    let files = sides * arguments.chunks.get() as u64;
    check_space(scratch.path(), &geometries, files)?;
    let mut models = Vec::new();
    for geometry in geometries {
        let plan = plan(arguments, geometry);
        let steps = 2 * plan.chunks * (plan.rounds + 1);
        let bar = progress_bar(
            steps as u64,
            "{msg} [{bar:40}] {pos}/{len} chunks, {eta} left",
        );
        bar.set_message(geometry.name);
        let directory = scratch.path().join(geometry.name);
        std::fs::create_dir(&directory)
            .map_err(|error| Failure::io("create", &directory, &error))?;
        let measurement = run::measure(plan, &directory, &bar)?;
        bar.finish_and_clear();
        models.extend(ModelReport::all(&measurement));
    }
    let lookup = lookup::measure(scratch.path(), arguments.threads as usize)?;
    let report = Report {
        path: arguments.path.display().to_string(),
        models,
        lookup,
    };
    // Before the output, so that a reader that hangs does not keep the files.
    drop(scratch);
    print(arguments, &report, |out| report.write(out))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a report where it was asked for: JSON or a table on stdout, or JSON in a file and a table.
fn print(
    arguments: &Arguments,
    report: &impl Serialize,
    write: impl FnOnce(&mut StdoutLock<'_>) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match &arguments.json {
        Some(path) if path.as_os_str() == "-" => write_json(&mut out, report),
        Some(path) => {
            // Before the table, which may have a reader that goes away.
            let failed = |error: io::Error| Failure::io("write", path, &error);
            let mut file = BufWriter::new(File::create(path).map_err(failed)?);
            write_json(&mut file, report)?;
            file.flush().map_err(failed)?;
            Ok(write(&mut out)?)
        }
        None => Ok(write(&mut out)?),
    }
}

fn plan(arguments: &Arguments, geometry: Geometry) -> Plan {
    let threads = arguments.threads as usize;
    let buffer_bytes = (arguments.buffer_mib as usize) << 20;
    // Half of the staging buffers: the store keeps some for loads and would drop chunks beyond.
    let fitting = (buffer_bytes / geometry.payload_bytes() / 2).max(1);
    let in_flight = arguments.in_flight.map(|count| count as usize);
    Plan {
        geometry,
        chunks: arguments.chunks.get(),
        rounds: arguments.rounds as usize,
        threads,
        engines: arguments.engine.iter().map(|one| one.choice()).collect(),
        in_flight: in_flight.unwrap_or_else(|| fitting.min(2 * threads)),
        buffer_mib: arguments.buffer_mib as usize,
        memory_bytes: (arguments.memory_mib as usize) << 20,
    }
}

/// Refuses to start what cannot end: `files` chunk files of one round must fit, and the store leaves
/// a twentieth of the file system free.
fn check_space(path: &Path, geometries: &[Geometry], files: u64) -> Result<(), Failure> {
    let statistics = rustix::fs::statvfs(path)
        .map_err(|error| Failure::io("ask for free space", path, &error.into()))?;
    let largest = geometries
        .iter()
        .map(Geometry::payload_bytes)
        .max()
        .unwrap_or_default();
    // 1% covers heads and page tables, and 64 MiB the lookups' small files.
    let files = files.saturating_mul(largest as u64 + largest as u64 / 100);
    let kept = statistics.f_blocks.saturating_mul(statistics.f_frsize) / 20;
    let needed = files.saturating_add(kept).saturating_add(64 << 20);
    let available = statistics.f_bavail.saturating_mul(statistics.f_frsize);
    if needed <= available {
        return Ok(());
    }
    let (needed, available) = (human_bytes(needed), human_bytes(available));
    let place = path.parent().unwrap_or(path).display();
    Err(Failure::new(format!(
        "`{place}` has {available} free, {needed} are needed"
    ))
    .with_hint("ask for fewer --chunks, or give another --path"))
}
