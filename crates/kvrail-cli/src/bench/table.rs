//! The figures of a measurement, as a table for people.

use std::io::{self, Write};

use super::prompts;
use super::report::{LimitReport, ModelReport, OperationReport, Report};
use super::statistics::Spread;
use crate::output::{Align, Table, human_bytes};

/// A column: its name, and the cell of an operation of a model.
type Column = (
    &'static str,
    Align,
    fn(&ModelReport, &str, &OperationReport) -> String,
);

const COLUMNS: [Column; 15] = [
    ("MODEL", Align::Left, |model, _, _| model.model.to_owned()),
    ("ENGINE", Align::Left, |model, _, _| model.engine.to_owned()),
    ("OPERATION", Align::Left, |_, name, _| name.to_owned()),
    ("GB/s", Align::Right, |_, _, found| {
        two_places(found.kvrail.gb_per_second.median)
    }),
    ("RAW GB/s", Align::Right, |_, _, found| {
        two_places(found.raw.gb_per_second.median)
    }),
    ("RATIO (min-max)", Align::Right, |_, _, found| {
        spread(&found.ratio)
    }),
    (TO_FIRST, Align::Right, |_, _, found| {
        found
            .ratio_to_first
            .as_ref()
            .map_or_else(String::new, spread)
    }),
    (TO_MEMCPY, Align::Right, |_, _, found| {
        ratio_to(found.memcpy.as_ref())
    }),
    (TO_FIO, Align::Right, |_, _, found| {
        ratio_to(found.fio.as_ref())
    }),
    ("CPU s/GB", Align::Right, |_, _, found| {
        two_places(found.kvrail.cpu_seconds_per_gb.median)
    }),
    ("RAW CPU s/GB", Align::Right, |_, _, found| {
        two_places(found.raw.cpu_seconds_per_gb.median)
    }),
    ("p50 ms", Align::Right, |_, _, found| {
        one_place(found.kvrail.chunk_p50_ms)
    }),
    ("p99 ms", Align::Right, |_, _, found| {
        one_place(found.kvrail.chunk_p99_ms)
    }),
    ("RAW p50 ms", Align::Right, |_, _, found| {
        one_place(found.raw.chunk_p50_ms)
    }),
    ("RAW p99 ms", Align::Right, |_, _, found| {
        one_place(found.raw.chunk_p99_ms)
    }),
];

const TO_FIRST: &str = "TO FIRST (min-max)";
const TO_MEMCPY: &str = "TO MEMCPY (min-max)";
const TO_FIO: &str = "TO FIO (min-max)";

impl Report {
    /// Writes the figures for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for model in &self.models {
            write_model(model, out)?;
        }
        if !self.models.is_empty() {
            writeln!(out)?;
            self.table().write(out)?;
        }
        prompts::write(&self.prompts, out)?;
        if let Some(lookup) = &self.lookup {
            writeln!(
                out,
                "\nlookup of {} chunks, median of {}: {:.2} ms present, {:.2} ms asked again, \
                 {:.2} ms missing; one thread that asks for their status: {:.2} ms, of which the first \
                 is {:.2}",
                lookup.chunks,
                lookup.repeats,
                lookup.present_ms.median,
                lookup.repeated_ms.median,
                lookup.missing_ms.median,
                lookup.bare_ms.median,
                lookup.present_to_bare.median,
            )?;
        }
        match &self.growth {
            Some(growth) => growth.write(out),
            None => Ok(()),
        }
    }

    /// Returns the table, without the columns that nothing is in.
    fn table(&self) -> Table {
        let operations: Vec<(&ModelReport, String, &OperationReport)> = self
            .models
            .iter()
            .flat_map(|model| {
                let operations = model.operations().into_iter();
                operations.map(move |(name, operation)| (model, name, operation))
            })
            .collect();
        let has = |pick: fn(&OperationReport) -> bool| {
            operations.iter().any(|(_, _, operation)| pick(operation))
        };
        let columns = COLUMNS.into_iter().filter(|(name, _, _)| match *name {
            TO_FIRST => has(|found| found.ratio_to_first.is_some()),
            TO_MEMCPY => has(|found| found.memcpy.is_some()),
            TO_FIO => has(|found| found.fio.is_some()),
            _ => true,
        });
        let columns: Vec<Column> = columns.collect();
        let heads: Vec<(&str, Align)> = columns.iter().map(|column| (column.0, column.1)).collect();
        let mut table = Table::new(&heads);
        for (model, name, operation) in operations {
            let cells = columns
                .iter()
                .map(|(_, _, cell)| cell(model, &name, operation));
            table.row(cells.collect());
        }
        table
    }
}

fn write_model(model: &ModelReport, out: &mut impl Write) -> io::Result<()> {
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
    writeln!(
        out,
        "  loads from {}; raw: {}, {}",
        model.loaded_from, model.store.raw_does, model.load.raw_does,
    )?;
    if model.loaded_from == "memory" {
        let percent = 100.0 * model.memory_share;
        writeln!(out, "  {percent:.1}% of the loads were served from memory")?;
    }
    for fio in [&model.store.fio, &model.load.fio].into_iter().flatten() {
        writeln!(
            out,
            "  fio: {:.2} GB/s, {:.2} CPU s/GB ({})",
            fio.side.gb_per_second.median, fio.side.cpu_seconds_per_gb.median, fio.does,
        )?;
    }
    if let Some(memcpy) = &model.load.memcpy {
        let rate = memcpy.side.gb_per_second.median;
        writeln!(out, "  memcpy: {rate:.2} GB/s")?;
    }
    Ok(())
}

fn two_places(number: f64) -> String {
    format!("{number:.2}")
}

fn one_place(number: Option<f64>) -> String {
    number.map_or_else(String::new, |number| format!("{number:.1}"))
}

fn ratio_to(limit: Option<&LimitReport>) -> String {
    limit.map_or_else(String::new, |limit| spread(&limit.ratio))
}

fn spread(ratio: &Spread) -> String {
    format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.min, ratio.max)
}

fn direct(direct: bool) -> &'static str {
    if direct { "O_DIRECT" } else { "buffered" }
}
