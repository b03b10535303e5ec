//! An explanation for people.

use std::io::{self, Write};

use super::finding::Verdict;
use super::{ChunkExplanation, Elsewhere, Explanation};

/// Writes what is known of each chunk, and the answer of each namespace behind it.
pub(super) fn write(out: &mut impl Write, explanation: &Explanation) -> io::Result<()> {
    for (index, namespace) in explanation.namespaces.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        writeln!(out, "{}", namespace.name)?;
        let nowhere = Vec::new();
        let mut said = &nowhere;
        for (number, chunk) in namespace.chunks.iter().enumerate() {
            let (verdict, tokens) = (chunk.verdict.name(), tokens(chunk));
            writeln!(out, "  chunk {number}{tokens}  {verdict}  {}", chunk.key)?;
            for finding in &chunk.ranks {
                writeln!(out, "    rank {}: {}", finding.rank, finding.detail)?;
            }
            if chunk.ranks.is_empty() {
                writeln!(out, "    {NO_RANK}")?;
            }
            // What differs is the same for one chunk after the other: it is said once.
            if chunk.elsewhere != *said {
                for other in &chunk.elsewhere {
                    writeln!(out, "    {}", has_it(other))?;
                }
            }
            said = &chunk.elsewhere;
        }
        let (usable, given) = (namespace.usable, namespace.chunks.len());
        if usable < given && usable > 0 {
            writeln!(
                out,
                "  chunks behind the first that is missing are not loaded, present or not"
            )?;
        }
        writeln!(out, "  {}", namespace.answer)?;
    }
    Ok(())
}

/// Says in one sentence what can be loaded and why the rest cannot.
pub(super) fn answer(chunks: &[ChunkExplanation], usable: usize) -> String {
    let given = chunks.len();
    let head = format!("{usable} of {given} chunks can be loaded");
    let Some(miss) = chunks.get(usable) else {
        return head;
    };
    let several = miss.ranks.len() > 1;
    let finding = miss.ranks.iter().find(|one| one.verdict != Verdict::Hit);
    let why = match finding {
        None => NO_RANK.to_owned(),
        Some(finding) if several => format!("on rank {} {}", finding.rank, finding.detail),
        Some(finding) => finding.detail.clone(),
    };
    let other = miss.elsewhere.first();
    let other = other.map_or_else(String::new, |other| format!("; {}", has_it(other)));
    format!(
        "{head}; the first miss is chunk {usable}{}: {why}{other}",
        tokens(miss)
    )
}

/// What is known where a namespace has no rank of the group.
const NO_RANK: &str = "no chunk of this group was ever stored here";

fn tokens(chunk: &ChunkExplanation) -> String {
    let range = chunk.tokens;
    range.map_or_else(String::new, |[start, end]| {
        format!(" (tokens {start}..{end})")
    })
}

fn has_it(other: &Elsewhere) -> String {
    let name = &other.namespace;
    match &other.differences {
        Some(lines) => format!("{name} has it, and differs in {}", lines.join("; ")),
        None => format!("{name} has it; its identity cannot be read"),
    }
}
