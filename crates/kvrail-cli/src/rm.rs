//! `kvrail rm`: removes namespaces, or the chunks of them that nobody used for long.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{ArgGroup, Args};
use kvrail::store::capacity::Removals;
use kvrail::store::inspect::{self, NamespaceInfo, chunks, remove_namespace};
use serde::Serialize;

use crate::amount;
use crate::confirm::confirm;
use crate::failure::Failure;
use crate::output::{human_age, human_bytes, warn, write_json};
use crate::store_directory;

/// The arguments of `kvrail rm`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true)
    .args(["namespace", "all_but", "older_than", "quarantine"]))]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Only this namespace, by its directory's name or its 16 hex digits; may be given again
    #[arg(long, value_name = "NAME", conflicts_with = "all_but")]
    namespace: Vec<String>,
    /// All namespaces but this one; may be given again
    #[arg(long, value_name = "NAME")]
    all_but: Vec<String>,
    /// Not whole namespaces, but chunks that were not stored or loaded for so long, such as `30d`
    #[arg(long, value_name = "AGE", value_parser = amount::age)]
    older_than: Option<Duration>,
    /// Not whole namespaces, but what lies in quarantine
    #[arg(long, conflicts_with = "older_than")]
    quarantine: bool,
    /// Show what would be removed and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Removal {
    dry_run: bool,
    chunks: u64,
    bytes: u64,
    namespaces: Vec<NamespaceRemoval>,
}

#[derive(Debug, Serialize)]
struct NamespaceRemoval {
    name: String,
    directory: PathBuf,
    /// Whether all of it goes, or only some chunks.
    whole: bool,
    chunks: u64,
    bytes: u64,
    /// Folders that stay because something in them is not kvrail's.
    kept_folders: Vec<PathBuf>,
}

/// Which chunks go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Whole,
    NotUsedSince(SystemTime),
    Quarantine,
}

/// Removes what was asked for, after asking.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let chosen = choose(arguments, &namespaces)?;
    let what = match arguments.older_than {
        _ if arguments.quarantine => What::Quarantine,
        Some(age) => What::NotUsedSince(
            SystemTime::now()
                .checked_sub(age)
                .unwrap_or(SystemTime::UNIX_EPOCH),
        ),
        None => What::Whole,
    };
    let mut planned = Vec::new();
    for namespace in chosen {
        planned.push((namespace, plan(namespace, what)?));
    }
    planned.retain(|(_, plan)| plan.whole || plan.chunks > 0);
    let mut removal = Removal {
        dry_run: arguments.dry_run,
        chunks: 0,
        bytes: 0,
        namespaces: Vec::new(),
    };
    if !(arguments.dry_run || planned.is_empty()) {
        confirm(&question(arguments, &planned), arguments.yes)?;
    }
    let mut note = Noting::begin(arguments);
    for (namespace, plan) in planned {
        let done = if arguments.dry_run {
            plan
        } else {
            remove(namespace, what, plan, &mut note)?
        };
        removal.chunks += done.chunks;
        removal.bytes += done.bytes;
        removal.namespaces.push(done);
    }
    note.end();
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &removal)?;
    } else {
        write_text(&mut out, &removal)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes down in the store's account what goes, as it goes.
struct Noting(Option<Removals>);

impl Noting {
    fn begin(arguments: &Arguments) -> Self {
        if arguments.dry_run {
            return Self(None);
        }
        let removals = Removals::open(&arguments.directory);
        Self(removals.map_err(|error| too_high(&error)).ok())
    }

    fn removed(&mut self, bytes: u64) {
        if let Some(removals) = &mut self.0 {
            removals.note(bytes);
        }
    }

    fn end(self) {
        if let Some(Err(error)) = self.0.map(Removals::end) {
            too_high(&error);
        }
    }
}

/// The janitor's next pass finds out.
fn too_high(error: &kvrail::Error) {
    warn(&format!("usage is too high for a while: {error}"));
}

/// Returns the namespaces that were named, or all others, or all.
fn choose<'a>(
    arguments: &Arguments,
    namespaces: &'a [NamespaceInfo],
) -> Result<Vec<&'a NamespaceInfo>, Failure> {
    let find = |given: &Vec<String>| -> Result<Vec<&'a NamespaceInfo>, Failure> {
        let each = given.iter();
        each.map(|given| store_directory::find(namespaces, given))
            .collect()
    };
    let (named, spared) = (find(&arguments.namespace)?, find(&arguments.all_but)?);
    let is_in = |list: &[&NamespaceInfo], one: &NamespaceInfo| {
        list.iter().any(|other| other.directory == one.directory)
    };
    let chosen = namespaces
        .iter()
        .filter(|one| !is_in(&spared, one) && (named.is_empty() || is_in(&named, one)));
    Ok(chosen.collect())
}

/// Counts what would go.
fn plan(namespace: &NamespaceInfo, what: What) -> Result<NamespaceRemoval, Failure> {
    let mut plan = NamespaceRemoval {
        name: store_directory::name(namespace),
        directory: namespace.directory.clone(),
        whole: what == What::Whole,
        chunks: 0,
        bytes: 0,
        kept_folders: Vec::new(),
    };
    if let What::Whole | What::NotUsedSince(_) = what {
        for chunk in chunks(&namespace.directory) {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    warn(&error.to_string());
                    continue;
                }
            };
            if matches!(what, What::NotUsedSince(moment) if chunk.modified >= moment) {
                continue;
            }
            plan.chunks += 1;
            plan.bytes += chunk.bytes;
        }
    }
    if let What::Whole | What::Quarantine = what {
        for aside in inspect::quarantined(&namespace.directory)? {
            plan.chunks += 1;
            plan.bytes += aside.bytes;
        }
    }
    Ok(plan)
}

fn question(arguments: &Arguments, planned: &[(&NamespaceInfo, NamespaceRemoval)]) -> String {
    let chunks: u64 = planned.iter().map(|(_, plan)| plan.chunks).sum();
    let bytes: u64 = planned.iter().map(|(_, plan)| plan.bytes).sum();
    let what = match arguments.older_than {
        _ if arguments.quarantine => ", all in quarantine,".to_owned(),
        Some(age) => format!(", not used for {},", human_age(age.as_secs())),
        None => String::new(),
    };
    let names: Vec<&str> = planned.iter().map(|(_, plan)| plan.name.as_str()).collect();
    format!(
        "remove {chunks} chunks ({}){what} of {} namespaces in `{}` ({})?",
        human_bytes(bytes),
        planned.len(),
        arguments.directory.display(),
        names.join(", ")
    )
}

fn remove(
    namespace: &NamespaceInfo,
    what: What,
    plan: NamespaceRemoval,
    note: &mut Noting,
) -> Result<NamespaceRemoval, Failure> {
    let mut done = NamespaceRemoval {
        chunks: 0,
        bytes: 0,
        ..plan
    };
    match what {
        What::Whole => {
            let removed = remove_namespace(&namespace.directory, &mut |bytes| {
                note.removed(bytes);
            })?;
            done.chunks = removed.chunks;
            done.bytes = removed.bytes;
            done.kept_folders = removed.kept_folders;
        }
        What::Quarantine => {
            let removed = inspect::empty_quarantine(&namespace.directory, &mut |bytes| {
                note.removed(bytes);
            })?;
            done.chunks = removed.chunks;
            done.bytes = removed.bytes;
        }
        What::NotUsedSince(moment) => {
            for chunk in chunks(&namespace.directory) {
                match chunk {
                    // Looked at again: it may have been used since the question was asked.
                    Ok(chunk) if chunk.modified < moment => {
                        if chunk.remove()? {
                            done.chunks += 1;
                            done.bytes += chunk.bytes;
                            note.removed(chunk.bytes);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => warn(&error.to_string()),
                }
            }
        }
    }
    Ok(done)
}

fn write_text(out: &mut impl Write, removal: &Removal) -> io::Result<()> {
    let verb = if removal.dry_run {
        "would remove"
    } else {
        "removed"
    };
    for namespace in &removal.namespaces {
        let whole = if namespace.whole { "all" } else { "some" };
        writeln!(
            out,
            "{}  {} chunks ({}), {whole} of it",
            namespace.name,
            namespace.chunks,
            human_bytes(namespace.bytes)
        )?;
        for folder in &namespace.kept_folders {
            writeln!(out, "kept  {}  not all in it is kvrail's", folder.display())?;
        }
    }
    let bytes = human_bytes(removal.bytes);
    writeln!(out, "{verb} {} chunks ({bytes})", removal.chunks)
}
