//! `kvrail explain`: why chunks of a prompt were a miss.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use kvrail::ChunkKey;
use kvrail::store::capacity::{Eviction, EvictionReason, evictions};
use kvrail::store::inspect::{
    self, NamespaceInfo, QuarantinedChunk, differences, find_chunk, verify_chunk,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{age_seconds, human_age, human_bytes, write_json};
use crate::store_directory;

/// The arguments of `kvrail explain`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`; of several, one after the other
    directory: PathBuf,
    /// Chunk keys in hex, in the order of the prompt, as the connector's log line or
    /// `kv_transfer_params` give them
    #[arg(required = true, value_name = "KEY", value_parser = key)]
    keys: Vec<ChunkKey>,
    /// The namespace that the instance uses, by its directory's name or its 16 hex digits
    /// [default: each that there is]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The KV cache group
    #[arg(long, default_value_t = 0)]
    group: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn key(text: &str) -> Result<ChunkKey, String> {
    let text = text.trim().to_ascii_lowercase();
    ChunkKey::from_hex(text.strip_prefix("0x").unwrap_or(&text)).map_err(|error| error.to_string())
}

#[derive(Debug, Serialize)]
struct Explanation {
    namespaces: Vec<NamespaceExplanation>,
}

#[derive(Debug, Serialize)]
struct NamespaceExplanation {
    name: String,
    /// Leading chunks of those given that are present on all ranks and whole.
    usable: usize,
    chunks: Vec<ChunkExplanation>,
}

#[derive(Debug, Serialize)]
struct ChunkExplanation {
    key: String,
    /// `hit`, or why it is none.
    verdict: &'static str,
    /// One for each rank, and what else is known, in words.
    details: Vec<String>,
}

/// What is known of a chunk on one rank.
struct Finding {
    verdict: &'static str,
    detail: String,
}

/// What a namespace keeps of chunks that are not in their place any more.
struct Traces {
    aside: Vec<QuarantinedChunk>,
    /// Evictions of the chunks that were asked for, oldest first.
    evicted: Vec<Eviction>,
}

/// Prints what is known of each chunk.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let chosen: Vec<&NamespaceInfo> = match &arguments.namespace {
        None => namespaces.iter().collect(),
        Some(given) => vec![store_directory::find(&namespaces, given)?],
    };
    let mut explanation = Explanation {
        namespaces: Vec::new(),
    };
    for namespace in &chosen {
        explanation
            .namespaces
            .push(explain(arguments, namespace, &namespaces)?);
    }
    // With no namespace given, those that know nothing of the prompt say nothing.
    if arguments.namespace.is_none() {
        let knows = |found: &NamespaceExplanation| {
            let absent = |chunk: &ChunkExplanation| chunk.verdict == "never seen";
            !found.chunks.iter().all(absent)
        };
        if explanation.namespaces.iter().any(knows) {
            explanation.namespaces.retain(knows);
        }
    }
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &explanation)?;
    } else {
        write_text(&mut out, &explanation)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn explain(
    arguments: &Arguments,
    namespace: &NamespaceInfo,
    all: &[NamespaceInfo],
) -> Result<NamespaceExplanation, Failure> {
    let traces = Traces {
        aside: inspect::quarantined(&namespace.directory)?,
        evicted: evictions(&namespace.directory)
            .filter(|eviction| arguments.keys.contains(&eviction.key))
            .collect(),
    };
    let mut chunks = Vec::new();
    for key in &arguments.keys {
        chunks.push(explain_chunk(
            namespace,
            all,
            &traces,
            arguments.group,
            *key,
        )?);
    }
    Ok(NamespaceExplanation {
        name: store_directory::name(namespace),
        usable: chunks
            .iter()
            .take_while(|chunk| chunk.verdict == "hit")
            .count(),
        chunks,
    })
}

fn explain_chunk(
    namespace: &NamespaceInfo,
    all: &[NamespaceInfo],
    traces: &Traces,
    group: u32,
    key: ChunkKey,
) -> Result<ChunkExplanation, Failure> {
    let ranks: Vec<u32> = namespace
        .groups
        .iter()
        .filter(|(one, _)| *one == group)
        .map(|(_, rank)| *rank)
        .collect();
    let mut verdict = "hit";
    let mut details = Vec::new();
    for rank in &ranks {
        let found = on_rank(namespace, traces, (group, *rank, key))?;
        if found.verdict != "hit" && verdict == "hit" {
            verdict = found.verdict;
        }
        details.push(format!("rank {rank}: {}", found.detail));
    }
    if ranks.is_empty() {
        verdict = "never seen";
        details.push(format!("no chunk of group {group} was ever stored here"));
    }
    if verdict != "hit" {
        details.extend(elsewhere(namespace, all, group, key)?);
    }
    Ok(ChunkExplanation {
        key: key.to_string(),
        verdict,
        details,
    })
}

fn on_rank(
    namespace: &NamespaceInfo,
    traces: &Traces,
    place: (u32, u32, ChunkKey),
) -> Result<Finding, Failure> {
    let ago = |moment: SystemTime| format!("{} ago", human_age(age_seconds(moment)));
    if let Some(chunk) = find_chunk(&namespace.directory, place)? {
        let facts = format!(
            "{}, stored or used {}",
            human_bytes(chunk.bytes),
            ago(chunk.modified)
        );
        let checked = match &namespace.manifest {
            Ok(manifest) => verify_chunk(&chunk, manifest).map(|_| ()),
            Err(_) => Ok(()),
        };
        return Ok(match checked {
            Ok(()) => Finding {
                verdict: "hit",
                detail: format!("present and whole: {facts}"),
            },
            Err(error) => Finding {
                verdict: "damaged",
                detail: format!("present and bad, the next load sets it aside: {error}"),
            },
        });
    }
    let last = traces
        .aside
        .iter()
        .filter(|chunk| (chunk.group, chunk.rank, chunk.key) == place)
        .max_by_key(|chunk| chunk.since);
    let evicted = traces
        .evicted
        .iter()
        .rfind(|eviction| (eviction.group, eviction.rank, eviction.key) == place);
    if let Some(eviction) = evicted {
        let at = time(eviction.evicted_milliseconds);
        if last.is_none_or(|chunk| chunk.since <= at) {
            let why = match eviction.reason {
                EvictionReason::Size => "max_size left no room for it",
                EvictionReason::Space => "min_free asked for its space",
                EvictionReason::Age => "nobody used it for ttl",
                EvictionReason::Request => "kvrail gc was asked to",
            };
            let used = ago(time(eviction.used_milliseconds));
            return Ok(Finding {
                verdict: "evicted",
                detail: format!("evicted {}: {why}; last used {used}", ago(at)),
            });
        }
    }
    if let Some(chunk) = last {
        let reason = chunk.reason.as_deref().unwrap_or("nothing says why");
        return Ok(Finding {
            verdict: "in quarantine",
            detail: format!("set aside {}: {reason}", ago(chunk.since)),
        });
    }
    Ok(Finding {
        verdict: "never seen",
        detail: "absent: not stored here yet, or removed without a record".to_owned(),
    })
}

/// Returns the moment that many milliseconds after 1970.
fn time(milliseconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(milliseconds).unwrap_or_default())
}

/// Says which other namespaces hold the chunk's key, nearest first, and what differs.
fn elsewhere(
    namespace: &NamespaceInfo,
    all: &[NamespaceInfo],
    group: u32,
    key: ChunkKey,
) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for other in all
        .iter()
        .filter(|other| other.directory != namespace.directory)
    {
        let mut holds = false;
        for (_, rank) in other.groups.iter().filter(|(one, _)| *one == group) {
            holds |= find_chunk(&other.directory, (group, *rank, key))?.is_some();
        }
        if !holds {
            continue;
        }
        let name = store_directory::name(other);
        found.push(match (&namespace.manifest, &other.manifest) {
            (Ok(ours), Ok(theirs)) => {
                let lines = differences(ours, theirs);
                (
                    lines.len(),
                    format!("{name} has it, and differs in {}", lines.join("; ")),
                )
            }
            _ => (
                usize::MAX,
                format!("{name} has it; its identity cannot be read"),
            ),
        });
    }
    found.sort();
    Ok(found.into_iter().map(|(_, line)| line).collect())
}

fn write_text(out: &mut impl Write, explanation: &Explanation) -> io::Result<()> {
    for (index, namespace) in explanation.namespaces.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        let (usable, given) = (namespace.usable, namespace.chunks.len());
        writeln!(out, "{}", namespace.name)?;
        writeln!(out, "  {usable} of {given} chunks can be loaded")?;
        for (number, chunk) in namespace.chunks.iter().enumerate() {
            writeln!(out, "  chunk {number}  {}  {}", chunk.verdict, chunk.key)?;
            for detail in &chunk.details {
                writeln!(out, "    {detail}")?;
            }
        }
        if usable < given && usable > 0 {
            writeln!(
                out,
                "  chunks behind the first that is missing are not loaded, present or not"
            )?;
        }
    }
    Ok(())
}
