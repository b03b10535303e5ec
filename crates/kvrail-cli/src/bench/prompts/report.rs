//! The figures of answered prompts.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::server::{Answers, Closed, Counts};
use super::{Round, Wish};
use crate::bench::clients::Sample;
use crate::bench::geometry::CHUNK_TOKENS;
use crate::bench::plan::Plan;
use crate::bench::statistics::{Spread, percentile};
use crate::output::{Align, Table, human_bytes};

/// The figures of one geometry with one engine. Rates are medians over the rounds; a ratio is the
/// median of each round's own.
#[derive(Debug, Serialize)]
pub(crate) struct PromptsReport {
    pub(crate) model: &'static str,
    pub(crate) prompts: &'static str,
    chunk_tokens: usize,
    payload_bytes: usize,
    /// Prompts of each round.
    pub(crate) requests: usize,
    pub(crate) rounds: usize,
    threads: usize,
    pub(crate) in_flight: usize,
    max_size: Option<u64>,
    pub(crate) engine: &'static str,
    pub(crate) engine_reason: String,
    file_system: String,
    direct: bool,
    /// Share of the chunks asked for that were loaded.
    pub(crate) hit_rate: f64,
    /// Prompts in a second, of each counted round too.
    pub(crate) requests_per_second: Spread,
    pub(crate) requests_per_second_of_rounds: Vec<f64>,
    pub(crate) loaded_gb_per_second: Spread,
    pub(crate) stored_gb_per_second: Spread,
    /// For each GB that was loaded or stored.
    pub(crate) cpu_seconds_per_gb: Spread,
    /// The time that bare reads and writes of the same files take, over kvrail's; none where
    /// chunks are evicted.
    pub(crate) ratio: Option<Spread>,
    /// The same of bare reads and writes.
    pub(crate) raw_requests_per_second_of_rounds: Vec<f64>,
    /// The time of the first engine over this one's.
    ratio_to_first: Option<Spread>,
    pub(crate) lookup_p50_ms: f64,
    pub(crate) lookup_p99_ms: f64,
    /// From the lookup until all that was there of a prompt is in KV memory.
    pub(crate) hit_p50_ms: f64,
    pub(crate) hit_p99_ms: f64,
    /// Chunks that a lookup found and that could not be loaded.
    pub(crate) lost_chunks: u64,
    /// Chunks whose bytes were compared, all of them equal.
    pub(crate) verified_chunks: u64,
    retries: u64,
    /// The chunks that lie on each path in the end.
    pub(crate) chunks_of_paths: Vec<u64>,
}

impl PromptsReport {
    /// Works the figures out, one report for each engine.
    pub(super) fn all(plan: &Plan, wish: &Wish, rounds: &[Round], closed: &[Closed]) -> Vec<Self> {
        let closed = closed.iter().enumerate();
        closed
            .map(|(index, closed)| Self::new(plan, wish, rounds, index, closed))
            .collect()
    }

    fn new(plan: &Plan, wish: &Wish, rounds: &[Round], index: usize, closed: &Closed) -> Self {
        let of = |index: usize| -> Vec<&Answers> {
            let answers = rounds.iter().map(|round| round.answers.get(index));
            answers.flatten().collect()
        };
        let answers = of(index);
        let bare: Vec<&Sample> = rounds
            .iter()
            .filter_map(|round| round.bare.as_ref())
            .collect();
        let payload_bytes = plan.geometry.payload_bytes();
        let gigabytes = |chunks: u64| (chunks * payload_bytes as u64) as f64 / 1e9;
        let rate = |pick: &dyn Fn(&Counts) -> u64| {
            let rounds = answers.iter();
            Spread::of(rounds.map(|found| gigabytes(pick(&found.counts)) / found.sample.seconds))
        };
        let ratio = |others: &mut dyn Iterator<Item = &Sample>| {
            let pairs = others.zip(&answers);
            Spread::of(pairs.map(|(other, ours)| other.seconds / ours.sample.seconds))
        };
        let sum = |pick: &dyn Fn(&Counts) -> u64| -> u64 {
            answers.iter().map(|found| pick(&found.counts)).sum()
        };
        let requests_per_second = |sample: &Sample| wish.requests as f64 / sample.seconds;
        let of_rounds: Vec<f64> = answers
            .iter()
            .map(|found| requests_per_second(&found.sample))
            .collect();
        let milliseconds = |pick: fn(&Answers) -> &Vec<Duration>, percent| {
            let times = answers.iter().flat_map(|found| pick(found));
            percentile(times.map(|time| time.as_secs_f64() * 1e3), percent)
        };
        Self {
            model: plan.geometry.name,
            prompts: wish.workload.name(),
            chunk_tokens: CHUNK_TOKENS,
            payload_bytes,
            requests: wish.requests,
            rounds: rounds.len(),
            threads: plan.threads,
            in_flight: plan.in_flight,
            max_size: wish.max_size,
            engine: closed.mount.engine,
            engine_reason: closed.mount.engine_reason.clone(),
            file_system: closed.mount.file_system.clone(),
            direct: closed.mount.direct,
            hit_rate: sum(&|counts| counts.loaded) as f64
                / sum(&|counts| counts.asked).max(1) as f64,
            requests_per_second: Spread::of(of_rounds.iter().copied()),
            requests_per_second_of_rounds: of_rounds,
            loaded_gb_per_second: rate(&|counts| counts.loaded),
            stored_gb_per_second: rate(&|counts| counts.stored),
            cpu_seconds_per_gb: Spread::of(answers.iter().map(|found| {
                let moved = gigabytes(found.counts.loaded + found.counts.stored);
                found.sample.cpu_seconds / moved.max(f64::MIN_POSITIVE)
            })),
            ratio: (!bare.is_empty()).then(|| ratio(&mut bare.iter().copied())),
            raw_requests_per_second_of_rounds: bare
                .iter()
                .map(|sample| requests_per_second(sample))
                .collect(),
            ratio_to_first: (index > 0)
                .then(|| ratio(&mut of(0).into_iter().map(|found| &found.sample))),
            lookup_p50_ms: milliseconds(|found| &found.lookups, 50),
            lookup_p99_ms: milliseconds(|found| &found.lookups, 99),
            hit_p50_ms: milliseconds(|found| &found.hits, 50),
            hit_p99_ms: milliseconds(|found| &found.hits, 99),
            lost_chunks: sum(&|counts| counts.lost),
            verified_chunks: sum(&|counts| counts.loaded),
            retries: closed.retries,
            chunks_of_paths: closed.chunks.clone(),
        }
    }

    /// Writes what the table of all reports has no room for.
    fn write_head(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "{}: {} rounds of {} prompts ({}), chunks of {}, {} threads, {} prompts in flight",
            self.model,
            self.rounds,
            self.requests,
            self.prompts,
            human_bytes(self.payload_bytes as u64),
            self.threads,
            self.in_flight,
        )?;
        let paths: Vec<String> = self.chunks_of_paths.iter().map(u64::to_string).collect();
        writeln!(
            out,
            "  {} ({}) on {}: {} chunks verified, {} found and lost, {} submitted again; on the \
             paths in the end: {}",
            self.engine,
            self.engine_reason,
            self.file_system,
            self.verified_chunks,
            self.lost_chunks,
            self.retries,
            paths.join(", "),
        )
    }
}

/// Writes the figures for people.
pub(crate) fn write(reports: &[PromptsReport], out: &mut impl Write) -> io::Result<()> {
    if reports.is_empty() {
        return Ok(());
    }
    reports
        .iter()
        .try_for_each(|report| report.write_head(out))?;
    let mut table = Table::new(&[
        ("MODEL", Align::Left),
        ("ENGINE", Align::Left),
        ("HITS", Align::Right),
        ("PROMPTS/s", Align::Right),
        ("LOAD GB/s", Align::Right),
        ("STORE GB/s", Align::Right),
        ("AGAINST RAW (min-max)", Align::Right),
        ("TO FIRST (min-max)", Align::Right),
        ("CPU s/GB", Align::Right),
        ("LOOKUP p50 ms", Align::Right),
        ("p99 ms", Align::Right),
        ("HIT p50 ms", Align::Right),
        ("p99 ms", Align::Right),
    ]);
    for report in reports {
        table.row(vec![
            report.model.to_owned(),
            report.engine.to_owned(),
            format!("{:.1}%", 100.0 * report.hit_rate),
            format!("{:.1}", report.requests_per_second.median),
            format!("{:.2}", report.loaded_gb_per_second.median),
            format!("{:.2}", report.stored_gb_per_second.median),
            ratio_text(report.ratio.as_ref()),
            ratio_text(report.ratio_to_first.as_ref()),
            format!("{:.2}", report.cpu_seconds_per_gb.median),
            format!("{:.2}", report.lookup_p50_ms),
            format!("{:.2}", report.lookup_p99_ms),
            format!("{:.1}", report.hit_p50_ms),
            format!("{:.1}", report.hit_p99_ms),
        ]);
    }
    writeln!(out)?;
    table.write(out)
}

fn ratio_text(ratio: Option<&Spread>) -> String {
    ratio.map_or_else(String::new, |ratio| {
        format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.min, ratio.max)
    })
}
