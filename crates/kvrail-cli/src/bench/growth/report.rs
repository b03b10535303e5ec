//! The figures of stores of several sizes.

use std::io::{self, Write};

use serde::Serialize;

use super::probe::{Found, MOVED};
use crate::bench::lookup::CHUNKS as LOOKED_UP;
use crate::bench::statistics::Spread;
use crate::output::{Align, Table};

/// What was found at each size, the smallest first.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GrowthReport {
    rounds: usize,
    looked_up: usize,
    moved: u64,
    pub(crate) sizes: Vec<SizeReport>,
}

/// What was found at one size.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct SizeReport {
    pub(crate) chunks: u64,
    pub(crate) open_ms: Figure,
    /// Growth of a process's resident memory by opening.
    pub(crate) open_bytes: Figure,
    pub(crate) lookup_present_ms: Figure,
    pub(crate) lookup_missing_ms: Figure,
    /// Per chunk.
    pub(crate) store_ms: Figure,
    pub(crate) load_ms: Figure,
}

/// A measure, and how it compares with the smallest size of the same round.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Figure {
    #[serde(flatten)]
    pub(crate) spread: Spread,
    pub(crate) ratio_to_smallest: Spread,
}

impl GrowthReport {
    /// Works the figures out of what was found in each round at each size.
    pub(super) fn new(sizes: &[(u64, Vec<Found>)]) -> Self {
        let smallest = sizes.first().map_or(&[][..], |(_, found)| found.as_slice());
        let figure = |found: &[Found], pick: fn(&Found) -> f64| {
            let pairs = found.iter().zip(smallest);
            // Memory may be nothing at all, on both sides.
            let ratios = pairs
                .map(|(one, smallest)| pick(one) / pick(smallest))
                .filter(|ratio| ratio.is_finite());
            Figure {
                spread: Spread::of(found.iter().map(pick)),
                ratio_to_smallest: Spread::of(ratios),
            }
        };
        let reports = sizes.iter().map(|(chunks, found)| SizeReport {
            chunks: *chunks,
            open_ms: figure(found, |found| found.open_ms),
            open_bytes: figure(found, |found| found.open_bytes),
            lookup_present_ms: figure(found, |found| found.present_ms),
            lookup_missing_ms: figure(found, |found| found.missing_ms),
            store_ms: figure(found, |found| found.store_ms),
            load_ms: figure(found, |found| found.load_ms),
        });
        Self {
            rounds: smallest.len(),
            looked_up: LOOKED_UP,
            moved: MOVED,
            sizes: reports.collect(),
        }
    }

    /// Writes the figures for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "growth: a process opens a store, looks {} chunks up (present, then missing), stores and \
             loads {} of 256 KiB one by one; median of {} rounds (ratio to the smallest size)",
            self.looked_up, self.moved, self.rounds,
        )?;
        self.table().write(out)
    }

    fn table(&self) -> Table {
        let names = ["CHUNKS", "OPEN ms", "MEMORY MB", "PRESENT ms", "MISSING ms"];
        let names = names.into_iter().chain(["STORE ms", "LOAD ms"]);
        let heads: Vec<(&str, Align)> = names.map(|name| (name, Align::Right)).collect();
        let mut table = Table::new(&heads);
        let cell = |figure: &Figure, unit: f64| {
            let ratio = figure.ratio_to_smallest.median;
            format!("{:.2} ({ratio:.2})", figure.spread.median / unit)
        };
        for size in &self.sizes {
            table.row(vec![
                size.chunks.to_string(),
                cell(&size.open_ms, 1.0),
                cell(&size.open_bytes, 1e6),
                cell(&size.lookup_present_ms, 1.0),
                cell(&size.lookup_missing_ms, 1.0),
                cell(&size.store_ms, 1.0),
                cell(&size.load_ms, 1.0),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_is_compared_with_itself() {
        let found = |factor: f64| Found {
            open_ms: factor,
            open_bytes: 0.0,
            present_ms: 2.0 * factor,
            missing_ms: 1.0,
            store_ms: 1.0,
            load_ms: 1.0,
        };
        let small = vec![found(1.0), found(10.0), found(100.0)];
        let large = vec![found(2.0), found(20.0), found(100.0)];
        let report = GrowthReport::new(&[(10, small), (1000, large)]);
        let large = &report.sizes[1];
        assert_eq!(large.open_ms.spread.median, 20.0);
        assert_eq!(large.open_ms.ratio_to_smallest.median, 2.0);
        assert_eq!(large.open_ms.ratio_to_smallest.min, 1.0);
        assert_eq!(large.lookup_missing_ms.ratio_to_smallest.max, 1.0);
        assert_eq!(large.open_bytes.ratio_to_smallest.max, 0.0);
        let mut text = Vec::new();
        report.write(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("20.00 (2.00)"), "{text}");
    }
}
