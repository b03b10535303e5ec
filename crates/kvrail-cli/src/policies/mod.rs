//! `kvrail policies`: what each eviction and admission policy would do with made-up requests.
//!
//! The policies are the library's own code; only the chunks are numbers instead of files.

mod cache;

use std::collections::HashSet;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Args;
use kvrail::config::{Admission, EvictionPolicy};
use serde::Serialize;

use self::cache::Cache;
use crate::failure::Failure;
use crate::output::{Align, Table, write_json};
use crate::workload::{Request, Trace, Workload};

/// The arguments of `kvrail policies`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// What the prompts are like [default: each in turn]
    #[arg(long, value_enum)]
    workload: Option<Workload>,
    /// Requests of each trace; the first half only warms the cache up
    #[arg(long, default_value = "40000")]
    requests: NonZeroUsize,
    /// Cache sizes, in percent of all distinct chunks of the trace
    #[arg(long, value_delimiter = ',', default_value = "2,10",
        value_parser = clap::value_parser!(u64).range(1..=100))]
    sizes: Vec<u64>,
    /// What the trace is made from
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What there is to choose from.
const POLICIES: [(EvictionPolicy, &str, Admission, &str); 4] = [
    (EvictionPolicy::Lru, "lru", Admission::All, "all"),
    (EvictionPolicy::Reuse, "reuse", Admission::All, "all"),
    (
        EvictionPolicy::Lru,
        "lru",
        Admission::SecondUse,
        "second_use",
    ),
    (
        EvictionPolicy::Reuse,
        "reuse",
        Admission::SecondUse,
        "second_use",
    ),
];

#[derive(Debug, Serialize)]
struct Row {
    workload: &'static str,
    size_percent: u64,
    size_chunks: u64,
    policy: &'static str,
    admission: &'static str,
    /// Share of the chunks asked for that were there.
    hit_rate: f64,
    /// Chunks written for each 100 asked for.
    written_percent: f64,
}

/// Runs all policies over all traces and prints the result.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mut rows = Vec::new();
    let workloads = match arguments.workload {
        Some(one) => vec![one],
        None => Workload::ALL.to_vec(),
    };
    for workload in workloads {
        let trace = Trace::new(workload, arguments.seed);
        let requests: Vec<Request> = trace.take(arguments.requests.get()).collect();
        let distinct: HashSet<u64> = requests
            .iter()
            .flat_map(|request| request.chunks.iter().copied())
            .collect();
        let distinct = distinct.len() as u64;
        for percent in arguments.sizes.iter().copied() {
            let limit = (distinct * percent / 100).max(1);
            for (policy, policy_name, admission, admission_name) in POLICIES {
                let cache = Cache::new(policy, admission, limit);
                rows.push(Row {
                    size_percent: percent,
                    policy: policy_name,
                    admission: admission_name,
                    ..measure(workload, cache, &requests, limit)?
                });
            }
        }
        let unlimited = Cache::new(EvictionPolicy::Lru, Admission::All, u64::MAX / 2);
        rows.push(Row {
            size_percent: 100,
            policy: "no limit",
            ..measure(workload, unlimited, &requests, distinct)?
        });
    }
    let mut out = io::stdout().lock();
    if arguments.json {
        write_json(&mut out, &rows)?;
    } else {
        write_text(&mut out, &rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(
    workload: Workload,
    mut cache: Cache,
    requests: &[Request],
    limit: u64,
) -> Result<Row, Failure> {
    for (index, request) in requests.iter().enumerate() {
        if index == requests.len() / 2 {
            cache.counts = Default::default();
        }
        cache.serve(request)?;
    }
    let counts = cache.counts;
    let share = |part: u64| part as f64 / counts.chunks_asked.max(1) as f64;
    Ok(Row {
        workload: workload.name(),
        size_percent: 0,
        size_chunks: limit,
        policy: "",
        admission: "all",
        hit_rate: share(counts.chunks_hit),
        written_percent: 100.0 * share(counts.chunks_written),
    })
}

fn write_text(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    let mut table = Table::new(&[
        ("WORKLOAD", Align::Left),
        ("CACHE", Align::Right),
        ("CHUNKS", Align::Right),
        ("EVICTION", Align::Left),
        ("ADMISSION", Align::Left),
        ("HITS", Align::Right),
        ("WRITTEN", Align::Right),
    ]);
    for row in rows {
        table.row(vec![
            row.workload.to_owned(),
            format!("{}%", row.size_percent),
            row.size_chunks.to_string(),
            row.policy.to_owned(),
            row.admission.to_owned(),
            format!("{:.1}%", 100.0 * row.hit_rate),
            format!("{:.1}%", row.written_percent),
        ]);
    }
    table.write(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(workload: Workload, policy: usize, percent: u64) -> Row {
        let requests: Vec<Request> = Trace::new(workload, 3).take(3000).collect();
        let distinct: HashSet<u64> = requests
            .iter()
            .flat_map(|request| request.chunks.iter().copied())
            .collect();
        let limit = distinct.len() as u64 * percent / 100;
        let (policy, _, admission, _) = *POLICIES.get(policy).unwrap_or(&POLICIES[0]);
        measure(
            workload,
            Cache::new(policy, admission, limit),
            &requests,
            limit,
        )
        .unwrap_or_else(|failure| panic!("{failure}"))
    }

    #[test]
    fn what_is_used_once_is_written_by_no_second_use_admission() {
        let all = row(Workload::Once, 0, 10);
        assert!(all.hit_rate == 0.0 && all.written_percent > 99.0, "{all:?}");
        let second = row(Workload::Once, 2, 10);
        assert!(second.written_percent < 1.0, "{second:?}");
    }

    #[test]
    fn a_cache_of_everything_misses_only_what_is_new() {
        let all = row(Workload::Rag, 0, 200);
        assert!(
            (all.hit_rate + all.written_percent / 100.0 - 1.0).abs() < 1e-9,
            "{all:?}"
        );
        let small = row(Workload::Rag, 0, 5);
        assert!(
            small.hit_rate < all.hit_rate && small.hit_rate > 0.05,
            "{small:?} {all:?}"
        );
    }
}
