//! `kvrail gc`: removes chunks by age and size, leftovers of dead writers and empty folders.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use kvrail::store::capacity::{CollectOptions, Collected, collect};
use serde::Serialize;

use crate::amount;
use crate::confirm::confirm;
use crate::failure::Failure;
use crate::output::{human_bytes, write_json};
use crate::store_directory;

/// The arguments of `kvrail gc`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Only this namespace, by its directory's name or its 16 hex digits
    #[arg(long)]
    namespace: Option<String>,
    /// Remove least recently used chunks until no more than this is left: 500GB, 1.5TiB, 0
    #[arg(long, value_parser = amount::size)]
    to: Option<u64>,
    /// Remove chunks and quarantined files that were not used for longer: 7d, 12h, 30min, 90s
    #[arg(long, value_parser = amount::age)]
    older_than: Option<Duration>,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    directory: PathBuf,
    namespace: Option<String>,
    dry_run: bool,
    #[serde(flatten)]
    collected: Collected,
}

/// Asks, removes and prints what was removed.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let namespace = match &arguments.namespace {
        Some(given) => Some(store_directory::name(store_directory::find(
            &namespaces,
            given,
        )?)),
        None => None,
    };
    let options = |dry_run| CollectOptions {
        namespace: namespace.clone(),
        to_bytes: arguments.to,
        older_than: arguments.older_than,
        dry_run,
        ..CollectOptions::default()
    };
    let removes = arguments.to.is_some() || arguments.older_than.is_some();
    if removes && !arguments.dry_run && !arguments.yes {
        let planned = collect(&arguments.directory, &options(true))?;
        let (age, size) = (planned.removed_for_age, planned.removed_for_size);
        let bytes = human_bytes(age.bytes + size.bytes);
        let question = format!("remove {} chunks ({bytes})?", age.chunks + size.chunks);
        confirm(&question, false)?;
    }
    let collected = collect(&arguments.directory, &options(arguments.dry_run))?;
    let report = Report {
        directory: arguments.directory.clone(),
        namespace,
        dry_run: arguments.dry_run,
        collected,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &report)?;
    } else {
        write_text(&mut out, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write_text(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let done = &report.collected;
    let verb = if report.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let line = |chunks: u64, bytes: u64| format!("{chunks} chunks ({})", human_bytes(bytes));
    writeln!(out, "found {}", line(done.found.chunks, done.found.bytes))?;
    for (why, removed) in [
        ("for their age", done.removed_for_age),
        ("for the size", done.removed_for_size),
    ] {
        if removed.chunks > 0 {
            writeln!(out, "{verb} {} {why}", line(removed.chunks, removed.bytes))?;
        }
    }
    let quarantined = done.quarantined_removed;
    if quarantined.chunks > 0 {
        let bytes = human_bytes(quarantined.bytes);
        writeln!(
            out,
            "{verb} {} quarantined files ({bytes})",
            quarantined.chunks
        )?;
    }
    if !report.dry_run {
        writeln!(
            out,
            "removed {} leftover temp files and {} empty folders",
            done.leftovers_removed, done.folders_removed
        )?;
    }
    if done.account_corrected_bytes != 0 {
        writeln!(
            out,
            "corrected the account of the directory by {} bytes",
            done.account_corrected_bytes
        )?;
    }
    writeln!(out, "left {}", line(done.left.chunks, done.left.bytes))
}
