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
mod prompts;
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
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

pub(crate) use self::arguments::Arguments;
use self::gpu::Device;
pub(crate) use self::growth::{PROBE_COMMAND, ProbeArguments, run_probe};
use self::machine::Machine;
use self::plan::Plan;
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
    let fio = match geometries.is_empty() || arguments.prompts.is_some() {
        false => find_fio(arguments),
        true => None,
    };
    let scratches = arguments
        .path
        .iter()
        .map(|path| Scratch::new(path))
        .collect::<Result<Vec<_>, Failure>>()?;
    let shared_memory = arguments.local_cpu_shared.as_deref().map(Scratch::new);
    let shared_memory = shared_memory.transpose()?;
    let first = scratches.first().map(Scratch::path);
    let first = first.ok_or_else(|| Failure::new("--path is missing"))?;
    let (mut models, mut prompts) = (Vec::new(), Vec::new());
    for geometry in geometries {
        let plan = Plan {
            shared_memory: shared_memory.as_ref().map(|made| made.path().to_path_buf()),
            ..arguments.plan(geometry, fio.clone())
        };
        let directories = make_each(&scratches, geometry.name)?;
        if let Some(wish) = arguments.prompts() {
            let files = wish.files_at_most(&plan, directories.len());
            check_space(&scratches, &plan, files)?;
            prompts.extend(prompts::measure(&plan, &wish, &directories)?);
            continue;
        }
        check_space(&scratches, &plan, files_at_once(&plan))?;
        let steps = 2 * plan.chunks * (plan.rounds + plan.warm_up_rounds());
        let bar = progress_bar(
            steps as u64,
            "{msg} [{bar:40}] {pos}/{len} chunks, {eta} left",
        );
        bar.set_message(geometry.name);
        let measurement = run::measure(plan, &directories, &bar)?;
        bar.finish_and_clear();
        models.extend(ModelReport::all(&measurement));
    }
    let threads = arguments.threads as usize;
    let lookup = match models.is_empty() {
        false => Some(lookup::measure(first, threads)?),
        true => None,
    };
    let growth = match arguments.growth.is_empty() {
        false => Some(growth::measure(first, arguments)?),
        true => None,
    };
    let paths: Vec<String> = arguments
        .path
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let report = Report {
        path: paths.join(", "),
        machine,
        fio: fio.map(|program| program.version().to_owned()),
        models,
        prompts,
        lookup,
        growth,
    };
    // Before the output, so that a reader that hangs does not keep the files.
    drop((scratches, shared_memory));
    if let Some(path) = &arguments.html {
        let page = html::page(&report)?;
        std::fs::write(path, page).map_err(|error| Failure::io("write", path, &error))?;
    }
    print(arguments, &report, |out| report.write(out))?;
    Ok(ExitCode::SUCCESS)
}

/// Makes a folder of a name on each path.
fn make_each(scratches: &[Scratch], name: &str) -> Result<Vec<PathBuf>, Failure> {
    let directories = scratches.iter().map(|scratch| scratch.path().join(name));
    let directories: Vec<PathBuf> = directories.collect();
    for directory in &directories {
        std::fs::create_dir(directory).map_err(|error| Failure::io("create", directory, &error))?;
    }
    Ok(directories)
}

/// Returns the fio to measure as well; says so where there is none.
fn find_fio(arguments: &Arguments) -> Option<fio::Program> {
    if arguments.no_fio {
        return None;
    }
    if arguments.path.len() > 1 {
        let _ = writeln!(
            io::stderr(),
            "measured without fio: there are several paths"
        );
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

/// Returns the chunk files of one round, of all sides together.
fn files_at_once(plan: &Plan) -> u64 {
    let sides = plan.engines.len() as u64 + 1 + u64::from(plan.fio.is_some());
    // A mix stores as many again, at most.
    sides * (1 + u64::from(plan.mix.is_some())) * plan.chunks as u64
}

/// Refuses to start what cannot end: `files` chunk files must fit, and the store leaves a twentieth
/// of a file system free.
pub(crate) fn check_space(scratches: &[Scratch], plan: &Plan, files: u64) -> Result<(), Failure> {
    let payload_bytes = plan.geometry.payload_bytes() as u64;
    // Several paths have shares of them that are not quite equal.
    let files = match scratches.len() as u64 {
        0 | 1 => files,
        paths => (2 * files / paths).min(files),
    };
    // 1% covers heads and page tables, and 64 MiB the lookups' small files.
    let files = files.saturating_mul(payload_bytes + payload_bytes / 100);
    for scratch in scratches {
        let path = scratch.path();
        let statistics = rustix::fs::statvfs(path)
            .map_err(|error| Failure::io("ask for free space", path, &error.into()))?;
        let kept = statistics.f_blocks.saturating_mul(statistics.f_frsize) / 20;
        let needed = files.saturating_add(kept).saturating_add(64 << 20);
        let available = statistics.f_bavail.saturating_mul(statistics.f_frsize);
        if needed > available {
            let (needed, available) = (human_bytes(needed), human_bytes(available));
            let place = path.parent().unwrap_or(path).display();
            return Err(Failure::new(format!(
                "`{place}` has {available} free, {needed} are needed"
            ))
            .with_hint("ask for less, or give another --path"));
        }
    }
    Ok(())
}
