//! The figures of a measurement, as JSON and as a table.
//!
//! GB are 10^9 bytes of payload, on both sides. Rates are medians over the rounds; the ratio is the
//! median of each round's own ratio, since both sides of a round met the same disk.

use std::io::{self, Write};
use std::time::Duration;

use kvrail::io::MountReport;
use serde::Serialize;

use super::clients::Sample;
use super::geometry::CHUNK_TOKENS;
use super::lookup::LookupTimes;
use super::run::{Measurement, Round, Sides};
use super::statistics::{Spread, percentile};
use crate::output::{Align, Table, human_bytes};

/// All that one run of `bench` found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) path: String,
    pub(crate) models: Vec<ModelReport>,
    pub(crate) lookup: LookupTimes,
}

/// The figures of one geometry with one engine.
#[derive(Debug, Serialize)]
pub(crate) struct ModelReport {
    model: &'static str,
    chunk_tokens: usize,
    blocks_per_chunk: usize,
    layers: usize,
    payload_bytes: usize,
    file_bytes: usize,
    chunks: usize,
    chunks_in_memory: usize,
    rounds: usize,
    threads: usize,
    in_flight: usize,
    engine: &'static str,
    engine_reason: String,
    file_system: String,
    direct: bool,
    raw_direct: bool,
    store: OperationReport,
    load: OperationReport,
    retries: u64,
    verified_chunks: u64,
}

/// kvrail and the raw limit at one operation.
#[derive(Debug, Serialize)]
struct OperationReport {
    kvrail: SideReport,
    raw: SideReport,
    /// kvrail's rate over the raw rate, per round.
    ratio: Spread,
    /// The rate over that with the first engine, per round; nothing for the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_to_first: Option<Spread>,
}

/// One side at one operation.
#[derive(Debug, Serialize)]
struct SideReport {
    gb_per_second: Spread,
    cpu_seconds_per_gb: Spread,
    /// kvrail: from the moment a client takes a chunk to submit it until its ticket is done, which
    /// includes waiting behind the others in flight. Raw: one file from open to close, as many at
    /// once as threads. So the two are no ratio of each other.
    chunk_p50_ms: f64,
    chunk_p99_ms: f64,
}

impl ModelReport {
    /// Works the figures out, one report for each engine.
    pub(crate) fn all(measurement: &Measurement) -> Vec<Self> {
        let mounts = measurement.mounts.iter().enumerate();
        mounts
            .map(|(index, mount)| Self::new(measurement, index, mount))
            .collect()
    }

    fn new(measurement: &Measurement, index: usize, mount: &MountReport) -> Self {
        let plan = &measurement.plan;
        let bytes = plan.geometry.payload_bytes() * plan.chunks;
        let rounds = &measurement.rounds;
        Self {
            model: plan.geometry.name,
            chunk_tokens: CHUNK_TOKENS,
            blocks_per_chunk: plan.geometry.blocks_per_chunk(),
            layers: plan.geometry.layers,
            payload_bytes: plan.geometry.payload_bytes(),
            file_bytes: measurement.file_bytes,
            chunks: plan.chunks,
            chunks_in_memory: measurement.slots,
            rounds: plan.rounds,
            threads: plan.threads,
            in_flight: plan.in_flight,
            engine: mount.engine,
            engine_reason: mount.engine_reason.clone(),
            direct: mount.direct,
            raw_direct: measurement.raw_direct,
            store: OperationReport::new(rounds, bytes, index, |round| &round.store),
            load: OperationReport::new(rounds, bytes, index, |round| &round.load),
            retries: measurement.retries.get(index).copied().unwrap_or_default(),
            verified_chunks: measurement.verified,
            file_system: mount.file_system.clone(),
        }
    }
}

impl OperationReport {
    fn new(
        rounds: &[Round],
        bytes: usize,
        index: usize,
        operation: impl Fn(&Round) -> &Sides,
    ) -> Self {
        let gigabytes = bytes as f64 / 1e9;
        let of = |engine: usize| -> Vec<&Sample> {
            let sides = rounds.iter().map(&operation);
            sides.filter_map(|sides| sides.kvrail.get(engine)).collect()
        };
        let (kvrail, first) = (of(index), of(0));
        let raw: Vec<&Sample> = rounds.iter().map(|round| &operation(round).raw).collect();
        let side = |samples: &[&Sample]| {
            let latencies = || {
                let each = samples.iter().flat_map(|sample| &sample.latencies);
                each.map(Duration::as_secs_f64).map(|seconds| seconds * 1e3)
            };
            SideReport {
                gb_per_second: Spread::of(samples.iter().map(|found| gigabytes / found.seconds)),
                cpu_seconds_per_gb: Spread::of(
                    samples.iter().map(|found| found.cpu_seconds / gigabytes),
                ),
                chunk_p50_ms: percentile(latencies(), 50),
                chunk_p99_ms: percentile(latencies(), 99),
            }
        };
        let ratio = |to: &[&Sample]| {
            let pairs = to.iter().zip(&kvrail);
            Spread::of(pairs.map(|(other, kvrail)| other.seconds / kvrail.seconds))
        };
        Self {
            ratio: ratio(&raw),
            ratio_to_first: (index > 0).then(|| ratio(&first)),
            kvrail: side(&kvrail),
            raw: side(&raw),
        }
    }
}

impl Report {
    /// Writes the figures for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for model in &self.models {
            writeln!(
                out,
                "{}: {} chunks of {} tokens, {} each, {} rounds, {} threads, {} in flight",
                model.model,
                model.chunks,
                model.chunk_tokens,
                human_bytes(model.payload_bytes as u64),
                model.rounds,
                model.threads,
                model.in_flight,
            )?;
            writeln!(
                out,
                "  {} ({}) on {}: kvrail {}, raw {}; {} chunks verified, {} submitted again",
                model.engine,
                model.engine_reason,
                model.file_system,
                direct(model.direct),
                direct(model.raw_direct),
                model.verified_chunks,
                model.retries,
            )?;
        }
        writeln!(out)?;
        self.table().write(out)?;
        let lookup = &self.lookup;
        writeln!(
            out,
            "\nlookup of {} chunks, median of {}: {:.2} ms present, {:.2} ms asked again, \
             {:.2} ms missing",
            lookup.chunks,
            lookup.repeats,
            lookup.present_ms.median,
            lookup.repeated_ms.median,
            lookup.missing_ms.median,
        )
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("MODEL", Align::Left),
            ("ENGINE", Align::Left),
            ("OPERATION", Align::Left),
            ("GB/s", Align::Right),
            ("RAW GB/s", Align::Right),
            ("RATIO (min-max)", Align::Right),
            ("TO FIRST (min-max)", Align::Right),
            ("CPU s/GB", Align::Right),
            ("RAW CPU s/GB", Align::Right),
            ("p50 ms", Align::Right),
            ("p99 ms", Align::Right),
            ("RAW p50 ms", Align::Right),
            ("RAW p99 ms", Align::Right),
        ]);
        for model in &self.models {
            for (name, operation) in [("store", &model.store), ("load", &model.load)] {
                let (kvrail, raw, ratio) = (&operation.kvrail, &operation.raw, &operation.ratio);
                table.row(vec![
                    model.model.to_owned(),
                    model.engine.to_owned(),
                    name.to_owned(),
                    format!("{:.2}", kvrail.gb_per_second.median),
                    format!("{:.2}", raw.gb_per_second.median),
                    spread(ratio),
                    operation
                        .ratio_to_first
                        .as_ref()
                        .map_or_else(String::new, spread),
                    format!("{:.2}", kvrail.cpu_seconds_per_gb.median),
                    format!("{:.2}", raw.cpu_seconds_per_gb.median),
                    format!("{:.1}", kvrail.chunk_p50_ms),
                    format!("{:.1}", kvrail.chunk_p99_ms),
                    format!("{:.1}", raw.chunk_p50_ms),
                    format!("{:.1}", raw.chunk_p99_ms),
                ]);
            }
        }
        table
    }
}

fn spread(ratio: &Spread) -> String {
    format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.min, ratio.max)
}

fn direct(direct: bool) -> &'static str {
    if direct { "O_DIRECT" } else { "buffered" }
}
