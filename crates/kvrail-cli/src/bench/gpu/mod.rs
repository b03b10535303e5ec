//! `kvrail bench --device cuda:N`: the same chunks in the memory of a GPU.
//!
//! - [`copies`] times what the GPU does inside its own memory, against a plain copy
//! - [`path`] is the store on one of its ways; [`pinned_copy`] and [`bare_cufile`] are what bounds
//!   them, together with the bare system calls of `raw`
//! - [`rounds`] lets all of them take turns, [`report`] works the ratios out

mod bare_cufile;
mod copies;
mod device;
mod kv_memory;
mod path;
mod pinned_copy;
mod report;
mod rounds;

use std::io::{self, Write};
use std::process::ExitCode;

use kvrail::OpenOptions;
use kvrail_cuda::LibraryPaths;
use kvrail_cuda::system::SystemView;

pub(super) use self::device::Device;
pub(super) use self::kv_memory::Outermost;
use self::report::{GpuModelReport, GpuReport};
use self::rounds::Setting;
use super::Arguments;
use super::scratch::Scratch;
use crate::cufile_probe;
use crate::doctor::cufile_candidates;
use crate::failure::Failure;
use crate::output::progress_bar;

/// Files of one round that lie there at the same time: three ways, bare calls of three kinds.
const COPIES_OF_FILES: u64 = 6;

/// Measures and prints.
pub(super) fn run(arguments: &Arguments, ordinal: usize) -> Result<ExitCode, Failure> {
    let options = OpenOptions {
        libraries: LibraryPaths {
            cufile: cufile_candidates(arguments.cufile_library.as_deref()),
            ..LibraryPaths::default()
        },
        cufile_probe: cufile_probe::program(),
        system: SystemView {
            root: arguments.system_root.clone(),
        },
        ..OpenOptions::default()
    };
    let (gpu, device) = device::open(ordinal, &options)?;
    let geometries = arguments.geometries();
    let scratch = Scratch::new(arguments.first_path())?;
    let chunks = arguments.chunks.get();
    let setting = Setting {
        gpu: &gpu,
        outermost: arguments.layout,
        options: &options,
    };
    let mut models = Vec::new();
    for geometry in geometries {
        let plan = arguments.plan(geometry, None);
        let files = COPIES_OF_FILES * chunks as u64;
        super::check_space(std::slice::from_ref(&scratch), &plan, files)?;
        let bar = progress_bar(
            (2 * plan.chunks * (plan.rounds + 1)) as u64,
            "{msg} [{bar:40}] {pos}/{len} chunks, {eta} left",
        );
        bar.set_message(geometry.name);
        let directory = scratch.path().join(geometry.name);
        std::fs::create_dir(&directory)
            .map_err(|error| Failure::io("create", &directory, &error))?;
        let measurement = rounds::measure(plan, &setting, &directory, &bar)?;
        bar.finish_and_clear();
        models.push(GpuModelReport::new(measurement));
    }
    let report = GpuReport {
        version: env!("CARGO_PKG_VERSION"),
        path: arguments.first_path().display().to_string(),
        device,
        layout: arguments.layout.name(),
        models,
    };
    // Before the output, so that a reader that hangs does not keep the files.
    drop(scratch);
    super::print(arguments, &report, |out: &mut io::StdoutLock<'_>| {
        report.write(out)?;
        if report.has_marks() {
            writeln!(out, "\n* the GPU waited for the calls: the time is theirs")?;
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
