//! `kvrail bench`: what the store does on a directory, against what the directory can do.
//!
//! Chunks of a model's geometry are stored, loaded (from disk, not from the page cache) and
//! compared; in the same run, interleaved, the same files are written and read with bare system
//! calls, and by `fio` where it is installed. Caches below the file system (a disk's, a hypervisor's, a server's) are out of reach.

mod arguments;
mod clients;
mod fio;
mod geometry;
mod gpu;
mod growth;
mod html;
mod kv_memory;
mod lookup;
mod machine;
mod memcpy;
mod mix;
mod page_cache;
mod plan;
mod random;
mod raw;
mod report;
mod run;
mod scratch;
mod sides;
mod statistics;
mod subject;
mod submission;
mod table;

use std::fs::File;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

pub(crate) use self::arguments::Arguments;
use self::geometry::Geometry;
use self::gpu::Device;
pub(crate) use self::growth::{PROBE_COMMAND, ProbeArguments, run_probe};
use self::machine::Machine;
pub(crate) use self::random::Random;
use self::report::{ModelReport, Report};
use self::scratch::Scratch;
pub(crate) use self::scratch::{CLEANUP_COMMAND, CleanupArguments, clean_up};
use crate::failure::Failure;
use crate::output::{human_bytes, progress_bar, write_json};

/// Measures and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if let Device::Cuda(ordinal) = arguments.device {
        if let Some(option) = arguments.host_only_option() {
            let message = format!("{option} is measured with --device cpu only");
            return Err(Failure::new(message).with_hint("leave one of the two out"));
        }
        return gpu::run(arguments, ordinal);
    }
    let machine = Machine::find();
    let geometries = arguments.geometries();
    let fio = match geometries.is_empty() {
        false => find_fio(arguments),
        true => None,
    };
    let scratch = Scratch::new(&arguments.path)?;
    // All sides' files of one round.
    let sides = arguments.engine.len() as u64 + 1 + u64::from(fio.is_some());
    // A mix stores as many again, at most.
    let times = 1 + u64::from(arguments.mix.is_some());
    let files = sides * times * arguments.chunks.get() as u64;
    check_space(scratch.path(), &geometries, files)?;
    let mut models = Vec::new();
    for geometry in geometries {
        let plan = arguments.plan(geometry, fio.clone());
        let steps = 2 * plan.chunks * (plan.rounds + plan.warm_up_rounds());
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
    let threads = arguments.threads as usize;
    let lookup = match models.is_empty() {
        false => Some(lookup::measure(scratch.path(), threads)?),
        true => None,
    };
    let growth = match arguments.growth.is_empty() {
        false => Some(growth::measure(scratch.path(), arguments)?),
        true => None,
    };
    let report = Report {
        path: arguments.path.display().to_string(),
        machine,
        fio: fio.map(|program| program.version().to_owned()),
        models,
        lookup,
        growth,
    };
    // Before the output, so that a reader that hangs does not keep the files.
    drop(scratch);
    if let Some(path) = &arguments.html {
        let page = html::page(&report)?;
        std::fs::write(path, page).map_err(|error| Failure::io("write", path, &error))?;
    }
    print(arguments, &report, |out| report.write(out))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the fio to measure as well; says so where there is none.
fn find_fio(arguments: &Arguments) -> Option<fio::Program> {
    if arguments.no_fio {
        return None;
    }
    let found = fio::Program::find(&arguments.fio);
    if found.is_none() {
        let name = arguments.fio.display();
        let _ = writeln!(io::stderr(), "`{name}` is not there: measured without fio");
    }
    found
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
