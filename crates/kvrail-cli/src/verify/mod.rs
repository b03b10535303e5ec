//! `kvrail verify`: reads chunks and checks all of each; with `--repair` bad ones are set aside.

mod pace;
mod resume;
mod selection;

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;
use indicatif::ProgressBar;
use kvrail::ErrorKind;
use kvrail::store::inspect::{self, Handled, NamespaceInfo, ScrubState, verify_chunk};
use serde::Serialize;

use self::pace::Pace;
use self::resume::Resume;
use self::selection::{Selected, Selection, Task};
use crate::amount::{self, Sample};
use crate::failure::{EXIT_DAMAGED, Failure};
use crate::output::{human_bytes, progress_bar, warn, write_json};
use crate::store_directory;

/// Bytes and chunks after which a run notes how far it has come.
const BATCH_BYTES: u64 = 256 << 20;
const BATCH_CHUNKS: usize = 512;
/// Damaged chunks that are listed; beyond that they are counted.
const LISTED_MAX: usize = 100_000;

/// The arguments of `kvrail verify`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Check only some chunks: a share (`5%`, `0.05`) or a number
    #[arg(long, value_name = "SHARE|COUNT", value_parser = amount::sample)]
    sample: Option<Sample>,
    /// Which chunks a sample takes [default: others each time]
    #[arg(long, requires = "sample")]
    seed: Option<u64>,
    /// Read at most so much per second, such as `200MB`
    #[arg(long, value_name = "RATE", value_parser = amount::rate)]
    rate: Option<u64>,
    /// Note in this file how far it has come, and go on from there; removed at the end
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Move damaged chunks to their namespace's quarantine, where they say why
    #[arg(long)]
    repair: bool,
    /// Threads that read and check [default: one per CPU]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize)]
struct Verification {
    checked: u64,
    checked_bytes: u64,
    /// Chunks that were removed between the listing and their check, which is no damage.
    vanished: u64,
    /// Chunks of namespaces whose manifest cannot be read.
    unchecked: u64,
    /// Folders that could not be read; stderr names them.
    unreadable: u64,
    /// Whether the run went on where an earlier one had stopped.
    resumed: bool,
    /// What decided about a sample; the same number draws the same chunks.
    seed: Option<u64>,
    /// Damaged chunks, those of the runs before included.
    damaged_count: u64,
    /// Of those, moved to quarantine by this run.
    set_aside: u64,
    /// Of those, removed because they could not be moved.
    removed: u64,
    /// The damaged chunks that this run found.
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

/// Checks the store and prints what is damaged.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let resume = arguments
        .resume
        .as_ref()
        .map(|path| Resume::new(path, &arguments.directory, describe(arguments.sample)));
    let earlier = match &resume {
        Some(resume) => resume.read()?,
        None => None,
    };
    let seed = earlier.as_ref().map(|state| state.seed);
    let seed = seed.or(arguments.seed).unwrap_or_else(random_seed);
    let mut found = Verification {
        resumed: earlier.is_some(),
        seed: arguments.sample.map(|_| seed),
        ..Verification::default()
    };
    let after = match &earlier {
        Some(state) => {
            found.checked = state.checked;
            found.checked_bytes = state.checked_bytes;
            found.damaged_count = state.damaged;
            Some(resume::after(state)?)
        }
        None => None,
    };
    note_unreadable(&namespaces, &mut found);
    let selection = Selection {
        sample: arguments.sample,
        seed,
    };
    let scrub = Scrub {
        namespaces: &namespaces,
        pace: Pace::new(arguments.rate),
        repair: arguments.repair,
        threads: thread_count(arguments.threads),
        bar: progress_bar(1000, "verify [{bar:40}] {percent}% {msg}"),
        found: Mutex::new(found),
    };
    scrub.run(selection.walk(&namespaces, after), seed, resume.as_ref())?;
    let mut found = scrub
        .found
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    found.damaged.sort();
    if let Some(resume) = &resume {
        resume.finish()?;
    }
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &found)?;
    } else {
        write_text(&mut out, &found)?;
    }
    Ok(match found.damaged_count {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(EXIT_DAMAGED),
    })
}

/// Counts what cannot be checked for want of a manifest, which is damage of the manifest.
fn note_unreadable(namespaces: &[NamespaceInfo], found: &mut Verification) {
    for namespace in namespaces {
        if let Err(reason) = &namespace.manifest {
            found.unchecked += inspect::chunks(&namespace.directory).count() as u64;
            found.damaged_count += 1;
            found.damaged.push(Damage {
                path: namespace.directory.join("manifest.json"),
                reason: reason.clone(),
            });
        }
    }
}

fn thread_count(asked: Option<NonZeroUsize>) -> usize {
    let default = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    asked.unwrap_or_else(default).get().min(BATCH_CHUNKS)
}

fn describe(sample: Option<Sample>) -> String {
    match sample {
        None => "all".to_owned(),
        Some(Sample::Share(share)) => format!("{share} of a million"),
        Some(Sample::Count(count)) => format!("{count} chunks"),
    }
}

/// Returns a number that differs from run to run.
fn random_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanoseconds = now.unwrap_or_default().subsec_nanos();
    u64::from(nanoseconds) << 20 ^ u64::from(std::process::id())
}

/// A verification under way.
struct Scrub<'a> {
    namespaces: &'a [NamespaceInfo],
    pace: Pace,
    repair: bool,
    threads: usize,
    bar: ProgressBar,
    found: Mutex<Verification>,
}

impl Scrub<'_> {
    /// Checks batch after batch, and notes each that is done.
    fn run(
        &self,
        mut selected: Selected<'_>,
        seed: u64,
        resume: Option<&Resume>,
    ) -> Result<(), Failure> {
        loop {
            let batch = self.next_batch(&mut selected);
            let Some(last) = batch.last() else { break };
            self.check(&batch)?;
            self.show(last);
            if let Some(resume) = resume {
                resume.write(self.state(last, seed))?;
            }
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    fn next_batch(&self, selected: &mut Selected<'_>) -> Vec<Task> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < BATCH_CHUNKS {
            match selected.next() {
                Some(Ok(task)) => {
                    bytes += task.chunk.bytes;
                    batch.push(task);
                }
                Some(Err(error)) => {
                    warn(&error.to_string());
                    self.add(|found| found.unreadable += 1);
                }
                None => break,
            }
        }
        batch
    }

    fn check(&self, batch: &[Task]) -> Result<(), Failure> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.threads.min(batch.len()) {
                let work = || {
                    while let Some(task) = batch.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.check_one(task);
                    }
                };
                std::thread::Builder::new()
                    .name("kvrail-verify".into())
                    .spawn_scoped(scope, work)
                    .map_err(|error| Failure::new(format!("start a thread: {error}")))?;
            }
            Ok(())
        })
    }

    fn check_one(&self, task: &Task) {
        let chunk = &task.chunk;
        let manifest = self.namespaces.get(task.namespace);
        let Some(Ok(manifest)) = manifest.map(|namespace| &namespace.manifest) else {
            return;
        };
        self.pace.wait(chunk.bytes);
        let verdict = verify_chunk(chunk, manifest);
        let Err(error) = verdict else {
            return self.add(|found| {
                found.checked += 1;
                found.checked_bytes += chunk.bytes;
            });
        };
        if chunk.path.symlink_metadata().is_err() {
            return self.add(|found| found.vanished += 1);
        }
        let damage = Damage::new(&chunk.path, &error);
        // What could not be read may be whole: it stays where it is.
        let handled = (self.repair && error.kind() == ErrorKind::Damaged)
            .then(|| inspect::set_aside(chunk, &damage.reason));
        if let Some(Err(error)) = &handled {
            warn(&error.to_string());
        }
        self.add(|found| {
            found.checked += 1;
            found.checked_bytes += chunk.bytes;
            found.damaged_count += 1;
            if found.damaged.len() < LISTED_MAX {
                found.damaged.push(damage);
            }
            match handled {
                Some(Ok(Handled::SetAside)) => found.set_aside += 1,
                Some(Ok(Handled::Removed)) => found.removed += 1,
                _ => {}
            }
        });
    }

    fn add(&self, change: impl FnOnce(&mut Verification)) {
        let found = self.found.lock();
        change(&mut found.unwrap_or_else(|poisoned| poisoned.into_inner()));
    }

    fn state(&self, last: &Task, seed: u64) -> ScrubState {
        let (group, rank, key) = last.chunk.place();
        let namespace = self.namespaces.get(last.namespace);
        let mut state = ScrubState {
            version: ScrubState::VERSION,
            directory: String::new(),
            selection: String::new(),
            seed,
            namespace: namespace.map(store_directory::name).unwrap_or_default(),
            group,
            rank,
            key: key.to_string(),
            checked: 0,
            checked_bytes: 0,
            damaged: 0,
        };
        self.add(|found| {
            state.checked = found.checked;
            state.checked_bytes = found.checked_bytes;
            // A manifest that cannot be read is found anew by each run.
            let manifests = self.namespaces.iter().filter(|one| one.manifest.is_err());
            state.damaged = found.damaged_count - manifests.count() as u64;
        });
        state
    }

    /// Shows how far the walk is: keys are hashes, so their first digits tell.
    fn show(&self, last: &Task) {
        let Some(namespace) = self.namespaces.get(last.namespace) else {
            return;
        };
        let share = |part: usize, of: usize| part as f64 / of.max(1) as f64;
        let place = (last.chunk.group, last.chunk.rank);
        let rank = namespace.groups.iter().position(|one| *one == place);
        let first = last.chunk.key.as_bytes().first().copied().unwrap_or(0);
        let within = (rank.unwrap_or(0) as f64 + f64::from(first) / 256.0)
            / namespace.groups.len().max(1) as f64;
        let done = share(last.namespace, self.namespaces.len())
            + within / self.namespaces.len().max(1) as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a thousand"
        )]
        self.bar.set_position((done * 1000.0) as u64);
        self.add(|found| {
            let (chunks, bytes) = (found.checked, human_bytes(found.checked_bytes));
            let bad = found.damaged_count;
            self.bar
                .set_message(format!("{chunks} chunks, {bytes}, {bad} damaged"));
        });
    }
}

fn write_text(out: &mut impl Write, found: &Verification) -> io::Result<()> {
    for damage in &found.damaged {
        writeln!(out, "damaged  {}  {}", damage.path.display(), damage.reason)?;
    }
    let mut line = format!(
        "checked {} chunks ({}): {} damaged",
        found.checked,
        human_bytes(found.checked_bytes),
        found.damaged_count
    );
    for (count, what) in [
        (found.set_aside, "set aside"),
        (found.removed, "removed, as they could not be set aside"),
        (found.vanished, "removed meanwhile"),
        (found.unchecked, "unchecked for want of a manifest"),
        (found.unreadable, "folders that cannot be read"),
    ] {
        if count > 0 {
            line.push_str(&format!(", {count} {what}"));
        }
    }
    if let Some(seed) = found.seed {
        line.push_str(&format!(" (a sample, --seed {seed})"));
    }
    if found.resumed {
        line.push_str(" (went on where an earlier run had stopped)");
    }
    writeln!(out, "{line}")
}
