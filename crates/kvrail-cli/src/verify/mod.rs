//! `kvrail verify`: reads every chunk and checks all of it. Changes nothing.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use clap::Args;
use indicatif::ProgressBar;
use kvrail::store::inspect::{ChunkFile, verify_chunk};
use serde::Serialize;
use serde_json::Value;

use crate::failure::{EXIT_DAMAGED, Failure};
use crate::output::{human_bytes, progress_bar, write_json};
use crate::store_directory;

/// The arguments of `kvrail verify`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Threads that read and check [default: one per CPU]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Verification {
    checked: u64,
    checked_bytes: u64,
    /// Chunks that were removed between the listing and their check, which is no damage.
    vanished: u64,
    /// Chunks of namespaces whose manifest cannot be read.
    unchecked: u64,
    damaged: Vec<Damage>,
}

#[derive(Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
struct Damage {
    path: PathBuf,
    reason: String,
}

impl Damage {
    fn new(path: &Path, error: &kvrail::Error) -> Self {
        // The path stands beside the reason; once is enough.
        let reason = error
            .to_string()
            .replace(&format!(": `{}`", path.display()), "");
        Self {
            path: path.to_path_buf(),
            reason,
        }
    }
}

/// One chunk to check and the manifest it belongs to.
struct Task<'a> {
    chunk: ChunkFile,
    manifest: &'a Value,
}

/// Counters and findings that all threads add to.
#[derive(Default)]
struct Findings {
    next: AtomicUsize,
    checked: AtomicU64,
    checked_bytes: AtomicU64,
    vanished: AtomicU64,
    damaged: Mutex<Vec<Damage>>,
}

/// Checks the store and prints what is damaged.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let mut tasks = Vec::new();
    let mut damaged = Vec::new();
    let mut unchecked = 0;
    for namespace in &namespaces {
        let chunks = store_directory::list(namespace);
        match &namespace.manifest {
            Ok(manifest) => tasks.extend(chunks.into_iter().map(|chunk| Task { chunk, manifest })),
            Err(reason) => {
                unchecked += chunks.len() as u64;
                let path = namespace.directory.join("manifest.json");
                damaged.push(Damage {
                    path,
                    reason: reason.clone(),
                });
            }
        }
    }
    let findings = check_all(&tasks, thread_count(arguments.threads, tasks.len()))?;
    damaged.extend(
        findings
            .damaged
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner()),
    );
    damaged.sort();
    let verification = Verification {
        checked: findings.checked.into_inner(),
        checked_bytes: findings.checked_bytes.into_inner(),
        vanished: findings.vanished.into_inner(),
        unchecked,
        damaged,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &verification)?;
    } else {
        write_text(&mut out, &verification)?;
    }
    let clean = verification.damaged.is_empty();
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_DAMAGED)
    })
}

fn thread_count(asked: Option<NonZeroUsize>, tasks: usize) -> usize {
    let default = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    asked.unwrap_or_else(default).get().min(tasks)
}

fn check_all(tasks: &[Task<'_>], threads: usize) -> Result<Findings, Failure> {
    let total = tasks.iter().map(|task| task.chunk.bytes).sum();
    let bar = progress_bar(
        total,
        "verify [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
    );
    let findings = Findings::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            std::thread::Builder::new()
                .name("kvrail-verify".into())
                .spawn_scoped(scope, || check_some(tasks, &findings, &bar))
                .map_err(|error| Failure::new(format!("start a thread: {error}")))?;
        }
        Ok::<(), Failure>(())
    })?;
    bar.finish_and_clear();
    Ok(findings)
}

/// Takes tasks until none is left.
fn check_some(tasks: &[Task<'_>], findings: &Findings, bar: &ProgressBar) {
    while let Some(task) = tasks.get(findings.next.fetch_add(1, Ordering::Relaxed)) {
        let verdict = verify_chunk(&task.chunk, task.manifest);
        bar.inc(task.chunk.bytes);
        if verdict.is_err() && task.chunk.path.symlink_metadata().is_err() {
            findings.vanished.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        findings.checked.fetch_add(1, Ordering::Relaxed);
        findings
            .checked_bytes
            .fetch_add(task.chunk.bytes, Ordering::Relaxed);
        if let Err(error) = verdict {
            let damage = Damage::new(&task.chunk.path, &error);
            let damaged = findings.damaged.lock();
            damaged
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .push(damage);
        }
    }
}

fn write_text(out: &mut impl Write, verification: &Verification) -> io::Result<()> {
    for damage in &verification.damaged {
        writeln!(out, "damaged  {}  {}", damage.path.display(), damage.reason)?;
    }
    let mut line = format!(
        "checked {} chunks ({}): {} damaged",
        verification.checked,
        human_bytes(verification.checked_bytes),
        verification.damaged.len()
    );
    if verification.vanished > 0 {
        line.push_str(&format!(", {} removed meanwhile", verification.vanished));
    }
    if verification.unchecked > 0 {
        line.push_str(&format!(
            ", {} unchecked for want of a manifest",
            verification.unchecked
        ));
    }
    writeln!(out, "{line}")
}
