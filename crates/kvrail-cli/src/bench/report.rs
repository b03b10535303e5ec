//! The figures of a measurement, as JSON.
//!
//! GB are 10^9 bytes of payload, on both sides. Rates are medians over the rounds; the ratio is the
//! median of each round's own ratio, since both sides of a round met the same disk.

use std::time::Duration;

use kvrail::io::MountReport;
use serde::Serialize;

use super::clients::Sample;
use super::geometry::CHUNK_TOKENS;
use super::growth::GrowthReport;
use super::lookup::LookupTimes;
use super::machine::Machine;
use super::plan::LoadSource;
use super::prompts::PromptsReport;
use super::run::Measurement;
use super::sides::{Round, Side, Sides};
use super::statistics::{Spread, percentile};

/// All that one run of `bench` found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) path: String,
    pub(crate) machine: Machine,
    /// The version of the fio that was measured as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fio: Option<String>,
    pub(crate) models: Vec<ModelReport>,
    /// With `--prompts`, instead of those.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) prompts: Vec<PromptsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lookup: Option<LookupTimes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) growth: Option<GrowthReport>,
}

/// The figures of one geometry with one engine.
#[derive(Debug, Serialize)]
pub(crate) struct ModelReport {
    pub(crate) model: &'static str,
    pub(crate) chunk_tokens: usize,
    blocks_per_chunk: usize,
    layers: usize,
    pub(crate) payload_bytes: usize,
    file_bytes: usize,
    pub(crate) chunks: usize,
    chunks_in_memory: usize,
    pub(crate) rounds: usize,
    /// Rounds before those, which do not count.
    pub(crate) warm_up_rounds: usize,
    pub(crate) threads: usize,
    pub(crate) in_flight: usize,
    pub(crate) engine: &'static str,
    pub(crate) engine_reason: String,
    pub(crate) file_system: String,
    pub(crate) direct: bool,
    pub(crate) raw_direct: bool,
    /// Where the bytes of loads were beforehand.
    pub(crate) loaded_from: &'static str,
    /// Which part of the loads kvrail's DRAM tier served, in all rounds together.
    pub(crate) memory_share: f64,
    pub(crate) store: OperationReport,
    pub(crate) load: OperationReport,
    /// Loads and stores at the same time; the times of chunks are those of the loads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mix: Option<OperationReport>,
    /// Which share of that mix are loads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mix_share: Option<f64>,
    pub(crate) retries: u64,
    pub(crate) verified_chunks: u64,
}

/// kvrail and its limits at one operation.
#[derive(Debug, Serialize)]
pub(crate) struct OperationReport {
    pub(crate) kvrail: SideReport,
    pub(crate) raw: SideReport,
    /// What the raw side does.
    pub(crate) raw_does: &'static str,
    /// kvrail's rate over the raw rate, per round.
    pub(crate) ratio: Spread,
    /// The rate over that with the first engine, per round; nothing for the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_to_first: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memcpy: Option<LimitReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fio: Option<LimitReport>,
}

/// Somebody else at the same operation.
#[derive(Debug, Serialize)]
pub(crate) struct LimitReport {
    pub(crate) does: String,
    #[serde(flatten)]
    pub(crate) side: SideReport,
    /// kvrail's rate over this one, per round.
    pub(crate) ratio: Spread,
}

/// One side at one operation.
#[derive(Debug, Serialize)]
pub(crate) struct SideReport {
    pub(crate) gb_per_second: Spread,
    /// The same, round by round.
    pub(crate) gb_per_second_of_rounds: Vec<f64>,
    pub(crate) cpu_seconds_per_gb: Spread,
    /// The same, round by round.
    pub(crate) cpu_seconds_per_gb_of_rounds: Vec<f64>,
    /// kvrail: from the moment a client takes a chunk to submit it until its ticket is done, which
    /// includes waiting behind the others in flight. Raw: one file from open to close, as many at
    /// once as threads. So the two are no ratio of each other. Nothing of fio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) chunk_p50_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) chunk_p99_ms: Option<f64>,
    /// That time at each of [`PERCENTS`].
    pub(crate) chunk_percentiles_ms: Vec<f64>,
}

/// The percents whose times are given.
pub(crate) const PERCENTS: [usize; 13] = [0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99, 100];

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
        let rounds = &measurement.rounds;
        let from_memory: u64 = rounds
            .iter()
            .filter_map(|round| round.from_memory.get(index))
            .sum();
        let operation = |kind| OperationReport::new(measurement, index, kind);
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
            warm_up_rounds: plan.warm_up_rounds(),
            threads: plan.threads,
            in_flight: plan.in_flight,
            engine: mount.engine,
            engine_reason: mount.engine_reason.clone(),
            direct: mount.direct,
            raw_direct: measurement.raw_direct,
            loaded_from: plan.load_source.name(),
            memory_share: from_memory as f64 / (rounds.len() * plan.chunks).max(1) as f64,
            store: operation(Kind::Store),
            load: operation(Kind::Load),
            mix: plan.mix.map(|_| operation(Kind::Mix)),
            mix_share: plan.mix,
            retries: measurement.retries.get(index).copied().unwrap_or_default(),
            verified_chunks: measurement.verified,
            file_system: mount.file_system.clone(),
        }
    }
}

/// The operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Store,
    Load,
    Mix,
}

impl Kind {
    fn sides(self, round: &Round) -> &Sides {
        match self {
            Self::Store => &round.store,
            Self::Load => &round.load,
            Self::Mix => &round.mix,
        }
    }

    /// Returns what the raw side does.
    fn raw_does(self, measurement: &Measurement) -> &'static str {
        match (self, measurement.plan.load_source, measurement.raw_direct) {
            (Self::Store, _, true) => "O_DIRECT write and rename",
            (Self::Store, _, false) => "buffered write and rename",
            (Self::Load, LoadSource::Disk, true) => "O_DIRECT read",
            (Self::Load, LoadSource::Disk, false) => "buffered read",
            (Self::Load, LoadSource::PageCache, _) => "read from the page cache",
            (Self::Load, LoadSource::Memory { .. }, _) => "memcpy",
            (Self::Mix, _, true) => "O_DIRECT write and rename, and reads",
            (Self::Mix, _, false) => "buffered write and rename, and reads",
        }
    }

    /// Returns what fio does.
    fn fio_does(self, measurement: &Measurement) -> Option<String> {
        let pattern = measurement.fio?;
        let is_cached = self == Self::Load && measurement.plan.load_source == LoadSource::PageCache;
        let direct = pattern.direct && !is_cached;
        let (engine, depth) = pattern.engine(direct);
        let operation = match self {
            Self::Store => "write",
            Self::Load => "read",
            Self::Mix => return None,
        };
        Some(format!(
            "{operation}, {engine}, iodepth {depth}, {} jobs, direct={}",
            pattern.threads,
            u8::from(direct)
        ))
    }
}

impl ModelReport {
    /// Returns the operations that were measured, with their names.
    pub(crate) fn operations(&self) -> Vec<(String, &OperationReport)> {
        let mut operations = vec![
            ("store".to_owned(), &self.store),
            ("load".to_owned(), &self.load),
        ];
        if let (Some(mix), Some(share)) = (&self.mix, self.mix_share) {
            operations.push((format!("mix, {share} loads"), mix));
        }
        operations
    }
}

impl OperationReport {
    fn new(measurement: &Measurement, index: usize, kind: Kind) -> Self {
        let plan = &measurement.plan;
        let chunks = match kind {
            Kind::Store | Kind::Load => plan.chunks,
            Kind::Mix => measurement.slots,
        };
        let gigabytes = (plan.geometry.payload_bytes() * chunks) as f64 / 1e9;
        let samples = |side: Side| -> Vec<&Sample> {
            let sides = measurement.rounds.iter().map(|round| kind.sides(round));
            sides.filter_map(|sides| sides.get(side)).collect()
        };
        let kvrail = samples(Side::Kvrail(index));
        let ratio = |to: &[&Sample]| {
            let pairs = to.iter().zip(&kvrail);
            Spread::of(pairs.map(|(other, kvrail)| other.seconds / kvrail.seconds))
        };
        let limit = |side: Side, does: String| {
            let samples = samples(side);
            (!samples.is_empty()).then(|| LimitReport {
                does,
                ratio: ratio(&samples),
                side: SideReport::new(&samples, gigabytes),
            })
        };
        let raw = samples(Side::Raw);
        let fio = kind.fio_does(measurement);
        Self {
            raw_does: kind.raw_does(measurement),
            ratio: ratio(&raw),
            ratio_to_first: (index > 0).then(|| ratio(&samples(Side::Kvrail(0)))),
            memcpy: limit(Side::Memcpy, "memcpy".to_owned()),
            fio: fio.and_then(|does| limit(Side::Fio, does)),
            raw: SideReport::new(&raw, gigabytes),
            kvrail: SideReport::new(&kvrail, gigabytes),
        }
    }
}

impl SideReport {
    fn new(samples: &[&Sample], gigabytes: f64) -> Self {
        let rates = || samples.iter().map(|found| gigabytes / found.seconds);
        let cpu = || samples.iter().map(|found| found.cpu_seconds / gigabytes);
        let latencies: Vec<f64> = samples
            .iter()
            .flat_map(|sample| &sample.latencies)
            .map(|latency| Duration::as_secs_f64(latency) * 1e3)
            .collect();
        let at = |percent| percentile(latencies.iter().copied(), percent);
        let is_known = !latencies.is_empty();
        Self {
            gb_per_second: Spread::of(rates()),
            gb_per_second_of_rounds: rates().collect(),
            cpu_seconds_per_gb: Spread::of(cpu()),
            cpu_seconds_per_gb_of_rounds: cpu().collect(),
            chunk_p50_ms: is_known.then(|| at(50)),
            chunk_p99_ms: is_known.then(|| at(99)),
            chunk_percentiles_ms: match is_known {
                true => PERCENTS.map(at).to_vec(),
                false => Vec::new(),
            },
        }
    }
}
