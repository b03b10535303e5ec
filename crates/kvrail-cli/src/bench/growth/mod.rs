//! `kvrail bench --growth`: whether a store with many chunks is as quick as one with few.
//!
//! - [`population`] makes stores of each size
//! - [`probe`] measures one, in a process of its own
//! - [`report`] works the figures out
//!
//! In each round each size is measured once, and which goes first changes.

mod population;
mod probe;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) use self::probe::{PROBE_COMMAND, ProbeArguments, run as run_probe};
pub(crate) use self::report::{GrowthReport, SizeReport};

use clap::ValueEnum;

use self::probe::Found;
use super::arguments::Arguments;
use super::sides::in_turn;
use crate::failure::Failure;
use crate::output::progress_bar;

/// Rounds at least, whatever was asked for: a median of fewer says little.
const ROUNDS_MIN: usize = 5;

/// Measures stores of each size that was asked for, below `directory`.
pub(crate) fn measure(directory: &Path, arguments: &Arguments) -> Result<GrowthReport, Failure> {
    let mut counts = arguments.growth.clone();
    counts.sort_unstable();
    counts.dedup();
    let bar = progress_bar(
        counts.iter().sum(),
        "{msg} [{bar:40}] {pos}/{len} chunks, {eta} left",
    );
    bar.set_message("growth: making stores");
    let mut stores: Vec<(u64, PathBuf, Vec<Found>)> = Vec::new();
    for count in counts {
        let path = directory.join(format!("growth-{count}"));
        population::make(&path, count, &bar)?;
        stores.push((count, path, Vec::new()));
    }
    bar.finish_and_clear();
    super::run::sync_file_system(directory)?;
    let rounds = (arguments.rounds as usize).max(ROUNDS_MIN);
    let steps = (rounds + 1) * stores.len();
    let bar = progress_bar(steps as u64, "{msg} [{bar:40}] {pos}/{len}, {eta} left");
    bar.set_message("growth: measuring");
    let order: Vec<usize> = (0..stores.len()).collect();
    for round in 0..=rounds {
        for index in in_turn(&order, round) {
            let Some((count, path, all)) = stores.get_mut(index) else {
                continue;
            };
            let found = probe_once(path, *count, arguments)?;
            // The first finds the names on disk, or not, as they were made.
            if round > 0 {
                all.push(found);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let sizes = stores.into_iter().map(|(count, _, found)| (count, found));
    Ok(GrowthReport::new(&sizes.collect::<Vec<_>>()))
}

/// Measures one store, once. Each wait of that process has an end.
fn probe_once(path: &Path, chunks: u64, arguments: &Arguments) -> Result<Found, Failure> {
    let failed =
        |reason: String| Failure::new(format!("measure a store of {chunks} chunks: {reason}"));
    // With several engines the first, as the one that the others are compared with.
    let engine = arguments
        .engine
        .first()
        .and_then(ValueEnum::to_possible_value);
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let output = Command::new(program)
        .arg(PROBE_COMMAND)
        .arg("--directory")
        .arg(path)
        .args(["--chunks", &chunks.to_string()])
        .args(["--threads", &arguments.threads.to_string()])
        .args([
            "--engine",
            engine.as_ref().map_or("auto", |engine| engine.get_name()),
        ])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let reason = text.trim().trim_start_matches("error: ");
        return Err(failed(reason.to_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}
