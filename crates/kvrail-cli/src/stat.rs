//! `kvrail stat`: totals of each namespace, leftovers, free space and identity.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvrail::store::inspect::{self, NamespaceInfo, chunks};
use serde::Serialize;
use serde_json::Value;

use crate::chains::{Chains, Links};
use crate::failure::Failure;
use crate::output::{AgeRange, age_seconds, human_age, human_bytes, warn, write_json};
use crate::store_directory;

/// The arguments of `kvrail stat`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// Also read every chunk's head, and tell how chunks hang together
    #[arg(long)]
    chains: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Statistics {
    directory: PathBuf,
    file_system: FileSystem,
    namespaces: Vec<NamespaceStatistics>,
}

#[derive(Debug, Serialize)]
struct FileSystem {
    total_bytes: u64,
    /// What is free to us, without what is reserved for root.
    available_bytes: u64,
}

#[derive(Debug, Serialize)]
struct NamespaceStatistics {
    name: String,
    directory: PathBuf,
    chunks: u64,
    bytes: u64,
    newest_age_seconds: Option<u64>,
    oldest_age_seconds: Option<u64>,
    /// By the time since each chunk was stored or, where hits refresh it, loaded.
    ages: Vec<AgeBand>,
    /// How chunks hang together, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    chains: Option<Chains>,
    /// Files being written, or left behind by a writer that died.
    temporary_files: usize,
    /// Damaged chunks that a load set aside.
    quarantined: usize,
    quarantined_bytes: u64,
    /// The youngest of them.
    last_quarantined: Option<LastQuarantined>,
    /// The manifest as it stands on disk, where it can be read.
    identity: Option<Value>,
    identity_error: Option<String>,
}

/// Chunks of some age.
#[derive(Debug, Serialize)]
struct AgeBand {
    /// Seconds below which a chunk's age lies; `None` for all that are older.
    below_seconds: Option<u64>,
    chunks: u64,
    bytes: u64,
}

/// The upper ends of the bands: an hour, a day, a week, thirty days.
const AGES_SECONDS: [u64; 4] = [3_600, 86_400, 604_800, 2_592_000];

#[derive(Debug, Serialize)]
struct LastQuarantined {
    age_seconds: u64,
    key: String,
    reason: Option<String>,
}

/// Prints the totals.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let statistics = Statistics {
        directory: arguments.directory.clone(),
        file_system: file_system(&arguments.directory)?,
        namespaces: namespaces
            .iter()
            .map(|namespace| summarize(namespace, arguments.chains))
            .collect::<Result<_, _>>()?,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &statistics)?;
    } else {
        write_text(&mut out, &statistics)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn file_system(directory: &Path) -> Result<FileSystem, Failure> {
    let found = rustix::fs::statvfs(directory)
        .map_err(|error| Failure::io("ask for free space", directory, &error.into()))?;
    Ok(FileSystem {
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        available_bytes: found.f_bavail.saturating_mul(found.f_frsize),
    })
}

/// Walks a namespace once; in memory is one folder at a time, and with `chains` a few bytes of each
/// chunk of one group's rank.
fn summarize(namespace: &NamespaceInfo, chains: bool) -> Result<NamespaceStatistics, Failure> {
    let ends = AGES_SECONDS.iter().copied().map(Some).chain([None]);
    let mut ages: Vec<AgeBand> = ends
        .map(|below_seconds| AgeBand {
            below_seconds,
            chunks: 0,
            bytes: 0,
        })
        .collect();
    let mut range = AgeRange::default();
    let mut sums = chains.then(Chains::default);
    let (mut links, mut place) = (Links::default(), None);
    for chunk in chunks(&namespace.directory) {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                warn(&error.to_string());
                continue;
            }
        };
        let age = age_seconds(chunk.modified);
        let within = |band: &&mut AgeBand| band.below_seconds.is_none_or(|below| age < below);
        if let Some(band) = ages.iter_mut().find(within) {
            band.chunks += 1;
            band.bytes += chunk.bytes;
        }
        range.add(age);
        if let Some(sums) = &mut sums {
            let here = Some((chunk.group, chunk.rank));
            if place != here {
                links.finish(sums);
                place = here;
            }
            links.add(&chunk);
        }
    }
    if let Some(sums) = &mut sums {
        links.finish(sums);
    }
    let aside = inspect::quarantined(&namespace.directory)?;
    Ok(NamespaceStatistics {
        name: store_directory::name(namespace),
        directory: namespace.directory.clone(),
        chunks: ages.iter().map(|band| band.chunks).sum(),
        bytes: ages.iter().map(|band| band.bytes).sum(),
        newest_age_seconds: range.newest,
        oldest_age_seconds: range.oldest,
        ages,
        chains: sums,
        temporary_files: namespace.temporary_files,
        quarantined: aside.len(),
        quarantined_bytes: aside.iter().map(|chunk| chunk.bytes).sum(),
        last_quarantined: aside.last().map(|chunk| LastQuarantined {
            age_seconds: age_seconds(chunk.since),
            key: chunk.key.to_string(),
            reason: chunk.reason.clone(),
        }),
        identity: namespace.manifest.as_ref().ok().cloned(),
        identity_error: namespace.manifest.as_ref().err().cloned(),
    })
}

fn write_ages(out: &mut impl Write, ages: &[AgeBand]) -> io::Result<()> {
    for band in ages.iter().filter(|band| band.chunks > 0) {
        let name = match band.below_seconds {
            Some(below) => format!("used < {}", human_age(below)),
            None => "older".to_owned(),
        };
        let bytes = human_bytes(band.bytes);
        writeln!(out, "  {name:<11}  {} ({bytes})", band.chunks)?;
    }
    Ok(())
}

fn write_text(out: &mut impl Write, statistics: &Statistics) -> io::Result<()> {
    let file_system = &statistics.file_system;
    writeln!(out, "{}", statistics.directory.display())?;
    writeln!(
        out,
        "  free         {} of {}",
        human_bytes(file_system.available_bytes),
        human_bytes(file_system.total_bytes)
    )?;
    for namespace in &statistics.namespaces {
        writeln!(out)?;
        writeln!(out, "{}", namespace.name)?;
        writeln!(
            out,
            "  chunks       {} ({})",
            namespace.chunks,
            human_bytes(namespace.bytes)
        )?;
        if let (Some(newest), Some(oldest)) =
            (namespace.newest_age_seconds, namespace.oldest_age_seconds)
        {
            writeln!(out, "  newest       {} ago", human_age(newest))?;
            writeln!(out, "  oldest       {} ago", human_age(oldest))?;
        }
        write_ages(out, &namespace.ages)?;
        if let Some(chains) = &namespace.chains {
            writeln!(
                out,
                "  chains       {} starts, {} ends, the longest of {} chunks, {} unreachable, {} unreadable",
                chains.starts, chains.ends, chains.longest, chains.unreachable, chains.unreadable
            )?;
        }
        writeln!(out, "  temporary    {}", namespace.temporary_files)?;
        let aside = human_bytes(namespace.quarantined_bytes);
        writeln!(out, "  quarantined  {} ({aside})", namespace.quarantined)?;
        if let Some(last) = &namespace.last_quarantined {
            let reason = last.reason.as_deref().unwrap_or("nothing says why");
            writeln!(
                out,
                "    last       {} ago: {reason}",
                human_age(last.age_seconds)
            )?;
        }
        if let Some(error) = &namespace.identity_error {
            writeln!(out, "  identity     unreadable: {error}")?;
        }
        if let Some(Value::Object(identity)) = &namespace.identity {
            writeln!(out, "  identity")?;
            for (key, value) in identity {
                writeln!(out, "    {key}: {}", summary(value))?;
            }
        }
    }
    Ok(())
}

/// Returns a value of the manifest on one line: short ones as they are, long ones by their size.
fn summary(value: &Value) -> String {
    /// Leaves room for the key on a line of 100 columns.
    const CHARACTERS_MAX: usize = 72;
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match value {
        _ if text.chars().count() <= CHARACTERS_MAX => text,
        Value::Object(fields) => format!("{{{} fields}}", fields.len()),
        Value::Array(items) => format!("[{} items]", items.len()),
        _ => text
            .chars()
            .take(CHARACTERS_MAX)
            .chain("...".chars())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_values_are_shown_by_their_size() {
        assert_eq!(summary(&json!("bfloat16")), "bfloat16");
        assert_eq!(summary(&json!({"a": 1})), r#"{"a":1}"#);
        assert_eq!(summary(&json!(vec![1_000_000; 50])), "[50 items]");
        assert_eq!(summary(&json!("x".repeat(100))).len(), 75);
    }
}
