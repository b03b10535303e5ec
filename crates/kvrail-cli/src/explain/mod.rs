//! `kvrail explain`: why chunks of a prompt were a miss.

mod finding;
mod prompt;
mod text;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use kvrail::ChunkKey;
use kvrail::store::inspect::{NamespaceInfo, differences, find_chunk};
use serde::Serialize;

use crate::failure::{EXIT_DAMAGED, Failure};
use crate::output::write_json;
use crate::store_directory;
use finding::{Finding, Traces, Verdict};
use prompt::Prompt;

/// The arguments of `kvrail explain`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`; of several, one after the other
    directory: PathBuf,
    /// Chunk keys in hex, in the order of the prompt, as the connector's log line or
    /// `kv_transfer_params` give them; `kvrail-explain` finds those of a prompt
    #[arg(value_name = "KEY", value_parser = prompt::key)]
    keys: Vec<ChunkKey>,
    /// Instead of keys, a file with the keys of a prompt in each namespace, as
    /// `kvrail-explain --keys-only` writes it; `-` is standard input
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "keys",
        required_unless_present = "keys"
    )]
    prompt: Option<PathBuf>,
    /// The namespace that the instance uses, by its directory's name or its 16 hex digits
    /// [default: each that knows something of the prompt]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The KV cache group
    #[arg(long, default_value_t = 0)]
    group: u32,
    /// Only look whether chunks are there, and read none of them
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Explanation {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<u64>,
    namespaces: Vec<NamespaceExplanation>,
}

#[derive(Debug, Serialize)]
struct NamespaceExplanation {
    name: String,
    /// Leading chunks that are present on all ranks and, where they were read, whole.
    usable: usize,
    /// Their tokens, where a chunk's tokens are known.
    usable_tokens: Option<u64>,
    chunks: Vec<ChunkExplanation>,
    /// The whole in one sentence.
    answer: String,
}

#[derive(Debug, Serialize)]
struct ChunkExplanation {
    key: String,
    /// The first token and the one behind the last, where they are known.
    tokens: Option<[u64; 2]>,
    /// That of the first rank that has no hit.
    verdict: Verdict,
    ranks: Vec<Finding>,
    /// Other namespaces that have it, the nearest first.
    elsewhere: Vec<Elsewhere>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Elsewhere {
    namespace: String,
    /// A line for each value of the identity; `None` where one cannot be read.
    differences: Option<Vec<String>>,
}

/// Prints what is known of each chunk.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let prompt = match &arguments.prompt {
        Some(path) => Prompt::read(path)?,
        None => Prompt::given(arguments.keys.clone()),
    };
    let namespaces = store_directory::open(&arguments.directory)?;
    let chosen: Vec<&NamespaceInfo> = match &arguments.namespace {
        None => namespaces.iter().collect(),
        Some(given) => vec![store_directory::find(&namespaces, given)?],
    };
    let mut explanation = Explanation {
        prompt_tokens: prompt.tokens,
        namespaces: Vec::new(),
    };
    for namespace in &chosen {
        let name = store_directory::name(namespace);
        if let Some(keys) = prompt.keys(&name) {
            let asked = Asked {
                prompt: &prompt,
                keys,
                namespace,
                name,
                all: &namespaces,
                group: arguments.group,
                quick: arguments.quick,
            };
            explanation.namespaces.push(asked.explain()?);
        }
    }
    if explanation.namespaces.is_empty() {
        let names: Vec<String> = chosen
            .iter()
            .map(|one| store_directory::name(one))
            .collect();
        let message = format!("no keys were given for {}", names.join(", "));
        return Err(Failure::new(message));
    }
    // With no namespace given, those that know nothing of the prompt say nothing.
    if arguments.namespace.is_none() {
        let knows = |found: &NamespaceExplanation| {
            let absent = |chunk: &ChunkExplanation| chunk.verdict == Verdict::NeverSeen;
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
        text::write(&mut out, &explanation)?;
    }
    let is_damaged = |chunk: &ChunkExplanation| chunk.verdict == Verdict::Damaged;
    let mut chunks = explanation
        .namespaces
        .iter()
        .flat_map(|found| &found.chunks);
    Ok(match chunks.any(is_damaged) {
        true => ExitCode::from(EXIT_DAMAGED),
        false => ExitCode::SUCCESS,
    })
}

/// One namespace that is asked about a prompt.
struct Asked<'a> {
    prompt: &'a Prompt,
    keys: &'a [ChunkKey],
    namespace: &'a NamespaceInfo,
    name: String,
    all: &'a [NamespaceInfo],
    group: u32,
    quick: bool,
}

/// Drops ranges of heads that are not there, where others of the same stage hold all heads: instances
/// of several tensor-parallel sizes store in one namespace, and each chunk need be there only once.
fn drop_unneeded(findings: &mut Vec<Finding>) {
    let stages: Vec<u32> = findings.iter().map(|one| one.rank.rank()).collect();
    for stage in stages {
        let of_stage = |one: &&Finding| one.rank.rank() == stage;
        let ranges = findings.iter().filter(of_stage);
        let last = ranges.clone().filter_map(|one| one.rank.heads());
        let Some(last) = last.map(|heads| heads.end()).max() else {
            continue;
        };
        let hits = ranges.filter(|one| one.verdict == Verdict::Hit);
        let hits: Vec<_> = hits.filter_map(|one| one.rank.heads()).collect();
        let is_held = |head| {
            let mut hits = hits.iter();
            hits.any(|heads| heads.first() <= head && head < heads.end())
        };
        if (0..last).all(is_held) {
            findings.retain(|one| one.rank.rank() != stage || one.verdict == Verdict::Hit);
        }
    }
}

impl Asked<'_> {
    fn explain(&self) -> Result<NamespaceExplanation, Failure> {
        let traces = Traces::read(self.namespace, self.keys)?;
        let mut chunks = Vec::new();
        for (index, key) in self.keys.iter().enumerate() {
            chunks.push(self.chunk(&traces, index, *key)?);
        }
        let findings = chunks.iter().flat_map(|chunk| &chunk.ranks);
        // All chunks of a group have as many tokens.
        let said = findings.filter_map(|finding| finding.tokens).next();
        let chunk_tokens = self.prompt.chunk_tokens(&self.name).or(said);
        for (chunk, index) in chunks.iter_mut().zip(0_u64..) {
            chunk.tokens = chunk_tokens.map(|tokens| {
                let start = index.saturating_mul(tokens);
                [start, start.saturating_add(tokens)]
            });
        }
        let hits = chunks
            .iter()
            .take_while(|chunk| chunk.verdict == Verdict::Hit);
        let usable = hits.count();
        Ok(NamespaceExplanation {
            name: self.name.clone(),
            usable,
            usable_tokens: chunk_tokens.map(|tokens| tokens.saturating_mul(usable as u64)),
            answer: text::answer(&chunks, usable),
            chunks,
        })
    }

    fn chunk(
        &self,
        traces: &Traces,
        index: usize,
        key: ChunkKey,
    ) -> Result<ChunkExplanation, Failure> {
        let mut ranks = Vec::new();
        for (group, rank) in &self.namespace.groups {
            if *group == self.group {
                let place = (*group, *rank, key);
                ranks.push(finding::look(self.namespace, traces, place, self.quick)?);
            }
        }
        drop_unneeded(&mut ranks);
        let missing = |finding: &&Finding| finding.verdict != Verdict::Hit;
        let verdict = match ranks.iter().find(missing) {
            Some(finding) => finding.verdict,
            None if ranks.is_empty() => Verdict::NeverSeen,
            None => Verdict::Hit,
        };
        let elsewhere = match verdict {
            Verdict::Hit => Vec::new(),
            _ => self.elsewhere(index)?,
        };
        Ok(ChunkExplanation {
            key: key.to_string(),
            tokens: None,
            verdict,
            ranks,
            elsewhere,
        })
    }

    /// Finds the other namespaces that hold the tokens of a chunk, nearest first.
    fn elsewhere(&self, index: usize) -> Result<Vec<Elsewhere>, Failure> {
        let mut found = Vec::new();
        for other in self.all {
            let name = store_directory::name(other);
            let key = match name == self.name {
                true => None,
                false => self.prompt.key_elsewhere(&self.name, index, &name),
            };
            let Some(key) = key else { continue };
            let mut holds = false;
            for (_, rank) in other.groups.iter().filter(|(one, _)| *one == self.group) {
                holds |= find_chunk(&other.directory, (self.group, *rank, key))?.is_some();
            }
            if holds {
                let identities = self.namespace.manifest.as_ref().ok();
                let identities = identities.zip(other.manifest.as_ref().ok());
                found.push(Elsewhere {
                    namespace: name,
                    differences: identities.map(|(ours, theirs)| differences(ours, theirs)),
                });
            }
        }
        found.sort_by_key(|one| one.differences.as_ref().map_or(usize::MAX, Vec::len));
        Ok(found)
    }
}
