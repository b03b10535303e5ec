//! `kvrail import`: copies the chunks of a directory of LMCache's `GdsBackend` into a namespace whose
//! chunk keys are LMCache's hashes.

mod batch;
mod target;

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvrail::store::inspect::{LmcacheFile, lmcache_files};
use serde::Serialize;

use self::batch::Batch;
use self::target::{Target, Unfit};
use crate::failure::{EXIT_DAMAGED, EXIT_FAILED, Failure};
use crate::output::{human_bytes, progress_bar, warn, write_json};

/// Damaged files that are listed; beyond that they are counted.
const LISTED_MAX: usize = 100_000;

/// The arguments of `kvrail import`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The directory of LMCache's `gds_path`; with several, one run for each
    source: PathBuf,
    /// The store: the directories of `gds_path`, all of them and in their order
    #[arg(required = true, num_args = 1..)]
    directories: Vec<PathBuf>,
    /// Into this namespace, by its directory's name or its 16 hex digits [default: the only one
    /// whose chunk keys are LMCache's hashes]
    #[arg(long)]
    namespace: Option<String>,
    /// Chunks that are read, put into order and written at the same time
    #[arg(long, default_value = "8")]
    at_a_time: NonZeroUsize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a run did.
#[derive(Debug, Default, Serialize)]
struct Report {
    source: PathBuf,
    namespace: String,
    /// Chunks copied, and the bytes of their KV.
    imported: u64,
    imported_bytes: u64,
    /// Chunks that the namespace had.
    already_present: u64,
    /// Chunks of other models, types of elements or numbers of workers.
    other_models: u64,
    /// Files of single layers (`use_layerwise`).
    layers: u64,
    /// Chunks of requests with tags.
    tagged: u64,
    /// Chunks with fewer tokens than a chunk of the namespace, or more.
    other_lengths: u64,
    /// Chunks for which there was no room.
    no_room: u64,
    /// Chunks that the file system refused; stderr says why.
    not_written: u64,
    /// Folders that could not be read; stderr names them.
    unreadable: u64,
    damaged_count: u64,
    damaged: Vec<Damage>,
}

/// A file that is not what LMCache writes, or could not be read.
#[derive(Debug, Serialize)]
struct Damage {
    path: PathBuf,
    reason: String,
}

impl Report {
    fn add_damage(&mut self, path: &Path, reason: impl ToString) {
        self.damaged_count += 1;
        if self.damaged.len() < LISTED_MAX {
            self.damaged.push(Damage {
                path: path.to_path_buf(),
                reason: reason.to_string(),
            });
        }
    }
}

/// Copies the chunks and prints how many.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let source = &arguments.source;
    if !source.is_dir() {
        return Err(
            Failure::new(format!("not a directory: `{}`", source.display()))
                .with_hint("give the directory of LMCache's `gds_path`"),
        );
    }
    let target = Target::open(&arguments.directories, arguments.namespace.as_deref())?;
    let mut report = Report {
        source: source.clone(),
        namespace: target.name().to_owned(),
        ..Report::default()
    };
    let bar = progress_bar(0, "{spinner} {msg}");
    let mut batch = Batch::new(&target, arguments.at_a_time)?;
    for file in lmcache_files(source) {
        match file {
            Ok(file) => take(&target, &mut batch, file, &mut report)?,
            Err(error) => {
                report.unreadable += 1;
                warn(&error.to_string());
            }
        }
        let (chunks, bytes) = (report.imported, human_bytes(report.imported_bytes));
        bar.set_message(format!("{chunks} chunks copied, {bytes}"));
        bar.tick();
    }
    batch.write(&mut report)?;
    bar.finish_and_clear();
    target.close()?;
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &report)?;
    } else {
        write_text(&mut out, &report)?;
    }
    Ok(match report {
        report if report.no_room + report.not_written > 0 => ExitCode::from(EXIT_FAILED),
        report if report.damaged_count > 0 => ExitCode::from(EXIT_DAMAGED),
        _ => ExitCode::SUCCESS,
    })
}

/// Counts a file, or adds it to what is copied next.
fn take(
    target: &Target,
    batch: &mut Batch<'_>,
    file: LmcacheFile,
    report: &mut Report,
) -> Result<(), Failure> {
    let chunk = match target.chunk(file.key()) {
        Ok(chunk) => chunk,
        Err(unfit) => {
            match unfit {
                Unfit::OtherModel => report.other_models += 1,
                Unfit::Layer => report.layers += 1,
                Unfit::Tagged => report.tagged += 1,
            }
            return Ok(());
        }
    };
    if target.has(chunk)? {
        report.already_present += 1;
        return Ok(());
    }
    let found = match file.read_metadata() {
        Ok(found) => found,
        Err(error) => {
            report.add_damage(&file.path, error);
            return Ok(());
        }
    };
    if target.is_other_length(&found) {
        report.other_lengths += 1;
        return Ok(());
    }
    batch.add(file, chunk);
    match batch.is_full() {
        true => batch.write(report),
        false => Ok(()),
    }
}

fn write_text(out: &mut impl Write, report: &Report) -> io::Result<()> {
    for damage in &report.damaged {
        writeln!(out, "damaged  {}  {}", damage.path.display(), damage.reason)?;
    }
    let mut line = format!(
        "copied {} chunks ({}) into {}",
        report.imported,
        human_bytes(report.imported_bytes),
        report.namespace
    );
    for (count, what) in [
        (report.already_present, "there already"),
        (report.damaged_count, "damaged"),
        (report.other_models, "of other models"),
        (report.other_lengths, "of another length"),
        (report.layers, "of single layers"),
        (report.tagged, "of requests with tags"),
        (report.no_room, "without room"),
        (report.not_written, "not written"),
        (report.unreadable, "folders that cannot be read"),
    ] {
        if count > 0 {
            line.push_str(&format!(", {count} {what}"));
        }
    }
    writeln!(out, "{line}")
}
