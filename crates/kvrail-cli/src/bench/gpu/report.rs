//! The figures of a run on a GPU, as JSON and as a table.
//!
//! GB are 10^9 bytes of payload, on all sides. A ratio is the median of each round's own ratio, since
//! all sides of a round met the same disk and the same GPU.

use std::io::{self, Write};

use kvrail::memory::CopyMethod;
use serde::Serialize;

use super::super::geometry::CHUNK_TOKENS;
use super::super::statistics::Spread;
use super::copies::{Timing, Work};
use super::device::DeviceReport;
use super::path::Way;
use super::rounds::{Measured, Measurement, Round, Side};
use crate::output::{Align, Table, human_bytes};

/// What gather and scatter, with hashes, should reach of a plain copy inside the GPU.
const COPY_TARGET: f64 = 0.7;
/// What store and load through pinned memory should reach of the slower of disk and PCIe.
const POSIX_TARGET: f64 = 0.9;
/// What store and load through cuFile should reach of bare calls.
const CUFILE_TARGET: f64 = 0.95;
/// Share of the I/O time for which a store may hold the compute stream.
const HELD_TARGET: f64 = 0.01;

/// All that one run of `bench` on a GPU found.
#[derive(Debug, Serialize)]
pub(crate) struct GpuReport {
    pub(crate) version: &'static str,
    pub(crate) path: String,
    pub(crate) device: DeviceReport,
    /// `lb` or `bl`: which axis of the KV cache is the outermost.
    pub(crate) layout: &'static str,
    pub(crate) models: Vec<GpuModelReport>,
}

/// The figures of one geometry.
#[derive(Debug, Serialize)]
pub(crate) struct GpuModelReport {
    model: &'static str,
    chunk_tokens: usize,
    payload_bytes: usize,
    file_bytes: usize,
    chunks: usize,
    chunks_in_memory: usize,
    rounds: usize,
    threads: usize,
    in_flight: usize,
    copy_method: String,
    copy_method_reason: String,
    raw_direct: bool,
    mounts: Vec<Mount>,
    copies: Vec<CopyReport>,
    moves: Vec<MoveReport>,
    limits: Vec<LimitReport>,
    skipped: Vec<Skipped>,
    verified_chunks: u64,
    retries: u64,
}

/// What the store said of its mount.
#[derive(Debug, Serialize)]
struct Mount {
    way: &'static str,
    #[serde(flatten)]
    report: kvrail::io::MountReport,
}

/// Something that was not measured.
#[derive(Debug, Serialize)]
struct Skipped {
    what: String,
    reason: String,
}

/// Work inside the GPU, against one plain copy.
#[derive(Debug, Serialize)]
struct CopyReport {
    work: &'static str,
    method: String,
    gb_per_second: Spread,
    plain_gb_per_second: Spread,
    ratio: Spread,
    target: Option<f64>,
    /// The GPU was through before the CPU had put all the work on the stream.
    calls_waited_for: bool,
}

/// One way of the store at one operation, against what bounds it.
#[derive(Debug, Serialize)]
struct MoveReport {
    operation: &'static str,
    way: &'static str,
    gb_per_second: Spread,
    gb_per_cpu_second: Spread,
    /// What it is compared with: the slower one of the last column's limits.
    limit: &'static str,
    limit_gb_per_second: Spread,
    ratio: Spread,
    target: f64,
    /// Time that the compute stream was held over the time of the whole; of stores only.
    held_share: Option<Spread>,
    held_target: Option<f64>,
}

/// A limit at one operation.
#[derive(Debug, Serialize)]
struct LimitReport {
    operation: &'static str,
    limit: &'static str,
    gb_per_second: Spread,
    gb_per_cpu_second: Spread,
}

impl GpuModelReport {
    /// Works the figures out.
    pub(crate) fn new(measurement: Measurement) -> Self {
        let plan = &measurement.plan;
        let chunk_bytes = plan.geometry.payload_bytes();
        let gigabytes = (chunk_bytes * plan.chunks) as f64 / 1e9;
        let rounds = &measurement.rounds;
        let figures = |operation, of: fn(&Round) -> &Vec<Measured>| Figures {
            operation,
            gigabytes,
            rounds: rounds.iter().map(of).collect(),
        };
        let figures = [
            figures("store", |round| &round.store),
            figures("load", |round| &round.load),
        ];
        let ways: Vec<Way> = measurement.mounts.iter().map(|(way, _)| *way).collect();
        let moves = |figures: &Figures<'_>| -> Vec<MoveReport> {
            ways.iter().map(|way| figures.way(*way)).collect()
        };
        Self {
            model: plan.geometry.name,
            chunk_tokens: CHUNK_TOKENS,
            payload_bytes: chunk_bytes,
            file_bytes: measurement.file_bytes,
            chunks: plan.chunks,
            chunks_in_memory: measurement.slots,
            rounds: plan.rounds,
            threads: plan.threads,
            in_flight: plan.in_flight,
            copy_method: measurement.method.to_string(),
            copy_method_reason: measurement.method_reason,
            raw_direct: measurement.raw_direct,
            copies: copies(rounds, chunk_bytes),
            moves: figures.iter().flat_map(moves).collect(),
            limits: figures.iter().flat_map(Figures::limits).collect(),
            mounts: measurement
                .mounts
                .into_iter()
                .map(|(way, report)| Mount {
                    way: way.name(),
                    report,
                })
                .collect(),
            skipped: measurement
                .skipped
                .into_iter()
                .map(|(what, reason)| Skipped { what, reason })
                .collect(),
            verified_chunks: measurement.verified,
            retries: measurement.retries,
        }
    }
}

/// One operation over all rounds.
struct Figures<'a> {
    operation: &'static str,
    gigabytes: f64,
    rounds: Vec<&'a Vec<Measured>>,
}

impl Figures<'_> {
    /// Returns the seconds of a side in each round.
    fn of(&self, side: Side, value: impl Fn(&Measured) -> f64) -> Vec<f64> {
        let found = |round: &&Vec<Measured>| {
            let measured = round.iter().find(|found| found.side == side)?;
            Some(value(measured))
        };
        self.rounds.iter().filter_map(found).collect()
    }

    fn seconds(&self, side: Side) -> Vec<f64> {
        self.of(side, |found| found.sample.seconds)
    }

    fn rate(&self, seconds: &[f64]) -> Spread {
        Spread::of(seconds.iter().map(|seconds| self.gigabytes / seconds))
    }

    fn cpu_rate(&self, side: Side) -> Spread {
        let cpu = self.of(side, |found| found.sample.cpu_seconds);
        self.rate(&cpu)
    }

    fn way(&self, way: Way) -> MoveReport {
        let own = self.seconds(Side::Store(way));
        let (limit, bound, target) = match way {
            Way::Posix => {
                let (disk, pinned) = (self.seconds(Side::Disk), self.seconds(Side::Pinned));
                let slower = disk.iter().zip(&pinned).map(|(a, b)| a.max(*b)).collect();
                let name = match Spread::of(disk).median >= Spread::of(pinned).median {
                    true => Side::Disk,
                    false => Side::Pinned,
                };
                (name, slower, POSIX_TARGET)
            }
            Way::Cufile => (Side::Cufile, self.seconds(Side::Cufile), CUFILE_TARGET),
            Way::Direct => {
                let seconds = self.seconds(Side::CufileBlocks);
                (Side::CufileBlocks, seconds, CUFILE_TARGET)
            }
        };
        let held = self.of(Side::Store(way), |found| {
            found.held_milliseconds / 1e3 / found.sample.seconds
        });
        let is_store = self.operation == "store";
        MoveReport {
            operation: self.operation,
            way: way.name(),
            gb_per_second: self.rate(&own),
            gb_per_cpu_second: self.cpu_rate(Side::Store(way)),
            limit: limit_name(limit),
            limit_gb_per_second: self.rate(&bound),
            ratio: Spread::of(bound.iter().zip(&own).map(|(bound, own)| bound / own)),
            target,
            held_share: is_store.then(|| Spread::of(held)),
            held_target: is_store.then_some(HELD_TARGET),
        }
    }

    fn limits(&self) -> Vec<LimitReport> {
        [Side::Disk, Side::Pinned, Side::Cufile, Side::CufileBlocks]
            .into_iter()
            .filter(|side| !self.seconds(*side).is_empty())
            .map(|side| LimitReport {
                operation: self.operation,
                limit: limit_name(side),
                gb_per_second: self.rate(&self.seconds(side)),
                gb_per_cpu_second: self.cpu_rate(side),
            })
            .collect()
    }
}

fn limit_name(side: Side) -> &'static str {
    match side {
        Side::Store(way) => way.name(),
        Side::Disk => "raw files",
        Side::Pinned => "pinned copy",
        Side::Cufile => "bare cuFile",
        Side::CufileBlocks => "bare cuFile, block by block",
    }
}

/// Works out each piece of work by each method.
fn copies(rounds: &[Round], chunk_bytes: usize) -> Vec<CopyReport> {
    let gigabytes = chunk_bytes as f64 / 1e9;
    let times = |work: Work, method: CopyMethod| -> Vec<Timing> {
        let all = rounds.iter().flat_map(|round| &round.copies);
        let own = all.filter(|(found, by, _)| (*found, *by) == (work, method));
        own.map(|(_, _, timing)| *timing).collect()
    };
    let rate =
        |times: &[Timing]| Spread::of(times.iter().map(|time| gigabytes / time.milliseconds * 1e3));
    let mut reports = Vec::new();
    for method in CopyMethod::ALL {
        let plain = times(Work::Plain, method);
        for work in Work::ALL {
            let own = times(work, method);
            if own.is_empty() {
                continue;
            }
            let pairs = plain.iter().zip(&own);
            reports.push(CopyReport {
                work: work.name(),
                method: method.to_string(),
                gb_per_second: rate(&own),
                plain_gb_per_second: rate(&plain),
                ratio: Spread::of(pairs.map(|(plain, own)| plain.milliseconds / own.milliseconds)),
                target: work.hashes().then_some(COPY_TARGET),
                calls_waited_for: own.iter().any(|time| time.calls_waited_for),
            });
        }
    }
    reports
}

impl GpuReport {
    /// Writes the figures for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.device.write(out)?;
        for model in &self.models {
            writeln!(
                out,
                "{}: {} chunks of {} tokens, {} each, layout {}, {} rounds, {} threads, \
                 {} in flight; {} chunks verified, {} submitted again",
                model.model,
                model.chunks,
                model.chunk_tokens,
                human_bytes(model.payload_bytes as u64),
                self.layout,
                model.rounds,
                model.threads,
                model.in_flight,
                model.verified_chunks,
                model.retries,
            )?;
            writeln!(
                out,
                "  pieces copied by {} ({})",
                model.copy_method, model.copy_method_reason
            )?;
            for mount in &model.mounts {
                let report = &mount.report;
                writeln!(
                    out,
                    "  {}: {} on {}, {}: {}",
                    mount.way,
                    report.engine,
                    report.file_system,
                    if report.direct {
                        "O_DIRECT"
                    } else {
                        "buffered"
                    },
                    report.reason
                )?;
            }
            for skipped in &model.skipped {
                writeln!(out, "  not measured: {}: {}", skipped.what, skipped.reason)?;
            }
        }
        writeln!(out)?;
        self.table().write(out)
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            ("MODEL", Align::Left),
            ("WHAT", Align::Left),
            ("GB/s", Align::Right),
            ("AGAINST", Align::Left),
            ("GB/s", Align::Right),
            ("RATIO (min-max)", Align::Right),
            ("TARGET", Align::Right),
            ("", Align::Left),
            ("GB PER CPU s", Align::Right),
        ]);
        for model in &self.models {
            let mut row = |cells: [String; 8]| {
                table.row([model.model.to_owned()].into_iter().chain(cells).collect());
            };
            for copy in &model.copies {
                let mark = if copy.calls_waited_for { " *" } else { "" };
                row([
                    format!("{}, {}{mark}", copy.work, copy.method),
                    format!("{:.1}", copy.gb_per_second.median),
                    "plain copy".to_owned(),
                    format!("{:.1}", copy.plain_gb_per_second.median),
                    spread(&copy.ratio),
                    copy.target
                        .map_or_else(String::new, |target| format!(">= {target:.2}")),
                    copy.target
                        .map_or_else(String::new, |target| met(copy.ratio.median >= target)),
                    String::new(),
                ]);
            }
            for moved in &model.moves {
                row([
                    format!("{}, {}", moved.operation, moved.way),
                    format!("{:.2}", moved.gb_per_second.median),
                    moved.limit.to_owned(),
                    format!("{:.2}", moved.limit_gb_per_second.median),
                    spread(&moved.ratio),
                    format!(">= {:.2}", moved.target),
                    met(moved.ratio.median >= moved.target),
                    format!("{:.1}", moved.gb_per_cpu_second.median),
                ]);
            }
            for moved in &model.moves {
                let Some((share, target)) = moved.held_share.as_ref().zip(moved.held_target) else {
                    continue;
                };
                row([
                    format!("compute stream held, {}", moved.way),
                    String::new(),
                    "I/O time".to_owned(),
                    String::new(),
                    format!("{:.4} ({:.4}-{:.4})", share.median, share.min, share.max),
                    format!("< {target:.2}"),
                    met(share.median < target),
                    String::new(),
                ]);
            }
            for limit in &model.limits {
                row([
                    format!("{}, {}", limit.operation, limit.limit),
                    format!("{:.2}", limit.gb_per_second.median),
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                    format!("{:.1}", limit.gb_per_cpu_second.median),
                ]);
            }
        }
        table
    }

    /// Returns whether a row has the mark that the GPU waited for calls.
    pub(crate) fn has_marks(&self) -> bool {
        let mut copies = self.models.iter().flat_map(|model| &model.copies);
        copies.any(|copy| copy.calls_waited_for)
    }
}

fn spread(ratio: &Spread) -> String {
    format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.min, ratio.max)
}

fn met(met: bool) -> String {
    if met { "met" } else { "missed" }.to_owned()
}
