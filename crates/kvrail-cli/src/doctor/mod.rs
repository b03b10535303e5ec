//! `kvrail doctor`: what this machine and these directories can do, and what to change.
//!
//! Whatever touches a mount or a driver runs on a thread that is left behind at the limit, so the
//! command always ends. cuFile's driver is never opened in this process: it can spin for ever.

mod advice;
mod cufile;
mod directory;
mod libraries;
mod machine;
mod measure;
mod scratch_file;
mod text;
mod weight;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use kvrail_cuda::system::SystemView;
use serde::{Serialize, Serializer};

use self::directory::{Directory, Examination};
pub(crate) use self::libraries::cufile_candidates;
use self::machine::Machine;
use crate::failure::Failure;
use crate::output::{progress_bar, warn, write_json};

/// The exit code where something that was asked for cannot be used.
const EXIT_UNUSABLE: u8 = 1;

/// The arguments of `kvrail doctor`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Directories to examine, as in `gds_path`: a file of 64 MiB is written and removed in each
    #[arg(value_name = "DIR")]
    directories: Vec<PathBuf>,
    /// The library of cuFile to use [default: libcufile.so.0 of the system, then of the wheels in
    /// the active virtual environment]
    #[arg(long, value_name = "PATH", env = "KVRAIL_CUFILE_LIBRARY")]
    cufile_library: Option<OsString>,
    /// Seconds to wait for each step before it counts as hanging
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Do not measure; a page is still written to find out what works
    #[arg(long)]
    no_measure: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Read /proc, /sys, /run and /dev below this folder, for tests.
    #[arg(long, hide = true, default_value = "/")]
    system_root: PathBuf,
}

/// All that was found out.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    /// Whether everything that was asked for works: the exit code.
    ok: bool,
    machine: Machine,
    directories: Vec<Directory>,
}

/// Examines and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let limit = Duration::from_secs(arguments.limit);
    let view = SystemView {
        root: arguments.system_root.clone(),
    };
    // An empty variable is one that is not set.
    let cufile = arguments.cufile_library.as_deref().map(Path::new);
    let cufile = cufile.filter(|path| !path.as_os_str().is_empty());
    let machine = Machine::examine(&view, cufile, limit);
    let examination = Examination {
        view: &view,
        machine: &machine,
        limit,
        measure: !arguments.no_measure,
    };
    let bar = progress_bar(arguments.directories.len() as u64, "{pos}/{len} {wide_msg}");
    let mut directories = Vec::new();
    for path in &arguments.directories {
        bar.set_message(path.display().to_string());
        directories.push(examination.examine(path));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let is_library_missing = cufile.is_some() && machine.libcufile.library().is_none();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        ok: directories.iter().all(|directory| directory.usable) && !is_library_missing,
        machine,
        directories,
    };
    print(arguments, &report)?;
    if is_library_missing {
        warn("the library that was asked for cannot be used");
    }
    Ok(match report.ok {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(EXIT_UNUSABLE),
    })
}

/// Writes a path of any bytes as JSON text.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn print(arguments: &Arguments, report: &Report) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    if arguments.json {
        return write_json(&mut out, report);
    }
    text::write_machine(&mut out, &report.machine)?;
    for directory in &report.directories {
        text::write_directory(&mut out, directory)?;
    }
    Ok(())
}
