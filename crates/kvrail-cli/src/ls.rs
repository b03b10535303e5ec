//! `kvrail ls`: namespaces, their groups and ranks, and on request every chunk.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use kvrail::Part;
use kvrail::store::inspect::{ChunkFile, NamespaceInfo};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{AgeRange, Align, Table, age_seconds, human_age, human_bytes, write_json};
use crate::store_directory;

/// The arguments of `kvrail ls`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The store: the directory of `gds_path`
    directory: PathBuf,
    /// List every chunk
    #[arg(long)]
    chunks: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Listing {
    namespaces: Vec<NamespaceListing>,
}

#[derive(Debug, Serialize)]
struct NamespaceListing {
    name: String,
    directory: PathBuf,
    groups: Vec<GroupListing>,
}

#[derive(Debug, Serialize)]
struct GroupListing {
    group: u32,
    rank: Part,
    chunks: u64,
    /// `None` where the first chunk has no readable head.
    tokens: Option<u64>,
    bytes: u64,
    newest_age_seconds: Option<u64>,
    oldest_age_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_files: Option<Vec<ChunkListing>>,
}

#[derive(Debug, Serialize)]
struct ChunkListing {
    key: String,
    bytes: u64,
    age_seconds: u64,
    path: PathBuf,
}

/// Prints the listing.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let namespaces = store_directory::open(&arguments.directory)?;
    let listing = Listing {
        namespaces: namespaces
            .iter()
            .map(|found| list(found, arguments.chunks))
            .collect(),
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &listing)?;
    } else {
        write_groups(&mut out, &listing)?;
        if arguments.chunks {
            writeln!(out)?;
            write_chunks(&mut out, &listing)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(namespace: &NamespaceInfo, with_chunks: bool) -> NamespaceListing {
    // A group that was attached but never stored to is listed too, with no chunks.
    let mut by_group: BTreeMap<(u32, Part), Vec<ChunkFile>> = namespace
        .groups
        .iter()
        .map(|place| (*place, Vec::new()))
        .collect();
    for chunk in store_directory::list(namespace) {
        by_group
            .entry((chunk.group, chunk.rank))
            .or_default()
            .push(chunk);
    }
    let groups = by_group
        .into_iter()
        .map(|((group, rank), chunks)| list_group(group, rank, &chunks, with_chunks))
        .collect();
    NamespaceListing {
        name: store_directory::name(namespace),
        directory: namespace.directory.clone(),
        groups,
    }
}

fn list_group(group: u32, rank: Part, chunks: &[ChunkFile], with_chunks: bool) -> GroupListing {
    let count = chunks.len() as u64;
    let tokens = match chunks.first() {
        Some(chunk) => store_directory::tokens_of(chunk).map(|tokens| tokens * count),
        None => Some(0),
    };
    let mut range = AgeRange::default();
    let ages = chunks.iter().map(|chunk| age_seconds(chunk.modified));
    ages.for_each(|age| range.add(age));
    GroupListing {
        group,
        rank,
        chunks: count,
        tokens,
        bytes: chunks.iter().map(|chunk| chunk.bytes).sum(),
        newest_age_seconds: range.newest,
        oldest_age_seconds: range.oldest,
        chunk_files: with_chunks.then(|| chunks.iter().map(list_chunk).collect()),
    }
}

fn list_chunk(chunk: &ChunkFile) -> ChunkListing {
    ChunkListing {
        key: chunk.key.to_string(),
        bytes: chunk.bytes,
        age_seconds: age_seconds(chunk.modified),
        path: chunk.path.clone(),
    }
}

fn write_groups(out: &mut impl Write, listing: &Listing) -> io::Result<()> {
    let mut table = Table::new(&[
        ("NAMESPACE", Align::Left),
        ("GROUP", Align::Right),
        ("RANK", Align::Right),
        ("CHUNKS", Align::Right),
        ("TOKENS", Align::Right),
        ("BYTES", Align::Right),
        ("NEWEST", Align::Right),
        ("OLDEST", Align::Right),
    ]);
    let age = |seconds: Option<u64>| seconds.map(human_age).unwrap_or_else(|| "-".into());
    for namespace in &listing.namespaces {
        for group in &namespace.groups {
            table.row(vec![
                namespace.name.clone(),
                group.group.to_string(),
                group.rank.to_string(),
                group.chunks.to_string(),
                group
                    .tokens
                    .map(|tokens| tokens.to_string())
                    .unwrap_or_else(|| "?".into()),
                human_bytes(group.bytes),
                age(group.newest_age_seconds),
                age(group.oldest_age_seconds),
            ]);
        }
        if namespace.groups.is_empty() {
            table.row(vec![
                namespace.name.clone(),
                "-".into(),
                "-".into(),
                "0".into(),
            ]);
        }
    }
    table.write(out)
}

fn write_chunks(out: &mut impl Write, listing: &Listing) -> io::Result<()> {
    let mut table = Table::new(&[
        ("AGE", Align::Right),
        ("BYTES", Align::Right),
        ("PATH", Align::Left),
    ]);
    let groups = listing
        .namespaces
        .iter()
        .flat_map(|namespace| &namespace.groups);
    for chunk in groups.flat_map(|group| group.chunk_files.iter().flatten()) {
        table.row(vec![
            human_age(chunk.age_seconds),
            human_bytes(chunk.bytes),
            chunk.path.display().to_string(),
        ]);
    }
    table.write(out)
}
