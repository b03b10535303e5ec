//! `kvrail stat`: totals of each namespace, leftovers, free space and identity.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvrail::store::inspect::NamespaceInfo;
use serde::Serialize;
use serde_json::Value;

use crate::failure::Failure;
use crate::output::{age_seconds, human_age, human_bytes, write_json};
use crate::store_directory;

/// The arguments of `kvrail stat`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
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
    /// Files being written, or left behind by a writer that died.
    temporary_files: usize,
    /// Damaged chunks that a load set aside.
    quarantined: usize,
    /// The manifest as it stands on disk, where it can be read.
    identity: Option<Value>,
    identity_error: Option<String>,
}

/// Prints the totals.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let statistics = Statistics {
        directory: arguments.directory.clone(),
        file_system: file_system(&arguments.directory)?,
        namespaces: namespaces.iter().map(summarize).collect(),
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

fn summarize(namespace: &NamespaceInfo) -> NamespaceStatistics {
    let chunks = store_directory::list(namespace);
    NamespaceStatistics {
        name: store_directory::name(namespace),
        directory: namespace.directory.clone(),
        chunks: chunks.len() as u64,
        bytes: chunks.iter().map(|chunk| chunk.bytes).sum(),
        newest_age_seconds: chunks
            .iter()
            .map(|chunk| chunk.modified)
            .max()
            .map(age_seconds),
        oldest_age_seconds: chunks
            .iter()
            .map(|chunk| chunk.modified)
            .min()
            .map(age_seconds),
        temporary_files: namespace.temporary_files,
        quarantined: namespace.quarantined,
        identity: namespace.manifest.as_ref().ok().cloned(),
        identity_error: namespace.manifest.as_ref().err().cloned(),
    }
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
        writeln!(out, "  temporary    {}", namespace.temporary_files)?;
        writeln!(out, "  quarantined  {}", namespace.quarantined)?;
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
