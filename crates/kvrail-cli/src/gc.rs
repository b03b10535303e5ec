//! `kvrail gc`: removes chunks by age and size, leftovers of dead writers and empty folders.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use kvrail::config;
use kvrail::store::capacity::{CollectOptions, Collected, collect};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{human_bytes, write_json};
use crate::store_directory;

/// The arguments of `kvrail gc`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Only this namespace, by its directory's name as `kvrail ls` shows it
    #[arg(long)]
    namespace: Option<String>,
    /// Remove least recently used chunks until no more than this is left: 500GB, 1.5TiB, 0
    #[arg(long, value_parser = size)]
    to: Option<u64>,
    /// Remove chunks and quarantined files that were not used for longer: 7d, 12h, 30min, 90s
    #[arg(long, value_parser = age)]
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

fn size(text: &str) -> Result<u64, String> {
    config::size(&serde_json::Value::String(text.to_owned()))
        .ok_or_else(|| "expected a size like 500GB or 512MiB, or a number of bytes".to_owned())
}

fn age(text: &str) -> Result<Duration, String> {
    config::age(text)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected an age like 7d, 12h, 30min or 90s".to_owned())
}

/// Asks, removes and prints what was removed.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    if let Some(name) = &arguments.namespace
        && !namespaces
            .iter()
            .any(|found| store_directory::name(found) == *name)
    {
        let message = format!(
            "no namespace `{name}` in `{}`",
            arguments.directory.display()
        );
        return Err(Failure::new(message).with_hint("`kvrail ls` shows their names"));
    }
    let options = |dry_run| CollectOptions {
        namespace: arguments.namespace.clone(),
        to_bytes: arguments.to,
        older_than: arguments.older_than,
        dry_run,
        ..CollectOptions::default()
    };
    let removes = arguments.to.is_some() || arguments.older_than.is_some();
    if removes && !arguments.dry_run && !arguments.yes {
        let planned = collect(&arguments.directory, &options(true))?;
        if !confirm(&planned)? {
            return Err(Failure::new("nothing was removed"));
        }
    }
    let report = Report {
        directory: arguments.directory.clone(),
        namespace: arguments.namespace.clone(),
        dry_run: arguments.dry_run,
        collected: collect(&arguments.directory, &options(arguments.dry_run))?,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &report)?;
    } else {
        write_text(&mut out, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks whether to go on; where nobody can answer, `--yes` must have done so.
fn confirm(planned: &Collected) -> Result<bool, Failure> {
    let stdin = io::stdin();
    let mut ask = io::stderr();
    let chunks = planned.removed_for_age.chunks + planned.removed_for_size.chunks;
    let bytes = planned.removed_for_age.bytes + planned.removed_for_size.bytes;
    let question = format!("remove {chunks} chunks ({})", human_bytes(bytes));
    if !stdin.is_terminal() {
        let message = format!("would {question}, and there is no terminal to ask on");
        return Err(Failure::new(message).with_hint("give --yes, or --dry-run to look first"));
    }
    write!(ask, "{question}? [y/N] ")?;
    ask.flush()?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
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
