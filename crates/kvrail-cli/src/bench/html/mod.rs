//! A report as one HTML file that needs nothing else: no network, no other file, no script.

mod escape;
mod plot;

use std::fmt::Write as _;

use self::escape::escaped;
use self::plot::{Plot, Series, short};
use super::growth::{GrowthReport, SizeReport};
use super::prompts::PromptsReport;
use super::report::{ModelReport, OperationReport, PERCENTS, Report, SideReport};
use crate::failure::Failure;
use crate::output::human_bytes;

const STYLE: &str = "\
:root{color-scheme:light dark}\
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}\
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}\
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}\
pre{overflow:auto;font-size:12px}\
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(21rem,1fr));gap:1rem}\
svg{width:100%;height:auto}svg text{font-size:11px;fill:currentColor}\
svg .title{font-size:13px;font-weight:600}svg .end{text-anchor:end}svg .middle{text-anchor:middle}\
svg .grid{stroke:currentColor;stroke-opacity:.2}\
svg polyline{fill:none;stroke-width:2;stroke:currentColor}svg .dot{fill:currentColor}\
.s0{color:#3b7dd8}.s1{color:#d9822b}.s2{color:#3a9d5d}.s3{color:#b04ac0}.s4{color:#888}";

/// Returns the page of a report.
pub(crate) fn page(report: &Report) -> Result<String, Failure> {
    let json = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::new(format!("encode the report: {error}")))?;
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <title>kvrail bench</title><style>{STYLE}</style></head><body>\n<h1>kvrail bench</h1>\n"
    );
    write_machine(report, &mut out);
    for model in &report.models {
        write_model(model, &mut out);
    }
    for prompts in &report.prompts {
        write_prompts(prompts, &mut out);
    }
    if let Some(lookup) = &report.lookup {
        let _ = writeln!(
            out,
            "<h2>Lookup</h2><p>{} chunks, median of {}: {} ms present, {} ms asked again, {} ms \
             missing; one thread that asks for their status: {} ms, of which the first is {}.</p>",
            lookup.chunks,
            lookup.repeats,
            short(lookup.present_ms.median),
            short(lookup.repeated_ms.median),
            short(lookup.missing_ms.median),
            short(lookup.bare_ms.median),
            short(lookup.present_to_bare.median),
        );
    }
    if let Some(growth) = &report.growth {
        write_growth(growth, &mut out);
    }
    let _ = writeln!(
        out,
        "<details><summary>All figures, as --json gives them</summary><pre>{}</pre></details>\
         </body></html>",
        escaped(&json)
    );
    Ok(out)
}

fn write_machine(report: &Report, out: &mut String) {
    let machine = &report.machine;
    let file_systems: Vec<&str> = report
        .models
        .iter()
        .map(|model| model.file_system.as_str())
        .collect();
    let file_system = file_systems.first().copied().unwrap_or("unknown");
    let cores = format!("{} ({} cores)", machine.cpu, machine.cores);
    let rows = [
        ("Command", machine.command.as_str()),
        ("Path", &format!("{} ({file_system})", report.path)),
        ("Processor", &cores),
        ("Memory", &human_bytes(machine.memory_bytes)),
        ("Kernel", &machine.kernel),
        ("Load before", &short(machine.load_before)),
        ("kvrail", machine.version),
        ("fio", report.fio.as_deref().unwrap_or("not measured")),
    ];
    out.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(out, "<tr><th>{name}</th><td>{}</td></tr>", escaped(value));
    }
    out.push_str("</table>\n");
}

fn write_model(model: &ModelReport, out: &mut String) {
    let _ = writeln!(
        out,
        "<h2>{}, {}</h2><p>{} chunks of {}, {} rounds, {} threads, {} in flight; loads from {}; \
         {} chunks verified. Engine: {}.</p>",
        escaped(model.model),
        escaped(model.engine),
        model.chunks,
        human_bytes(model.payload_bytes as u64),
        model.rounds,
        model.threads,
        model.in_flight,
        escaped(model.loaded_from),
        model.verified_chunks,
        escaped(&model.engine_reason),
    );
    for (name, operation) in model.operations() {
        write_operation(&name, operation, out);
    }
}

fn write_prompts(report: &PromptsReport, out: &mut String) {
    let _ = write!(
        out,
        "<h2>{}, {}: prompts ({})</h2><p>{} rounds of {} prompts, {} in flight; {} chunks verified, \
         {} found and lost. Engine: {}.</p><table>",
        escaped(report.model),
        escaped(report.engine),
        escaped(report.prompts),
        report.rounds,
        report.requests,
        report.in_flight,
        report.verified_chunks,
        report.lost_chunks,
        escaped(&report.engine_reason),
    );
    let paths: Vec<String> = report.chunks_of_paths.iter().map(u64::to_string).collect();
    let rows = [
        ("Chunks that were there, %", short(100.0 * report.hit_rate)),
        ("Prompts/s", short(report.requests_per_second.median)),
        ("Loaded, GB/s", short(report.loaded_gb_per_second.median)),
        ("Stored, GB/s", short(report.stored_gb_per_second.median)),
        (
            "Against bare reads and writes",
            report
                .ratio
                .map_or_else(String::new, |ratio| short(ratio.median)),
        ),
        ("CPU s/GB", short(report.cpu_seconds_per_gb.median)),
        ("Lookup, ms, p50", short(report.lookup_p50_ms)),
        ("Lookup, ms, p99", short(report.lookup_p99_ms)),
        ("Lookup and load, ms, p50", short(report.hit_p50_ms)),
        ("Lookup and load, ms, p99", short(report.hit_p99_ms)),
        ("Chunks on each path in the end", paths.join(", ")),
    ];
    for (name, value) in rows {
        let _ = write!(
            out,
            "<tr><th>{name}</th><td class=\"number\">{}</td></tr>",
            escaped(&value)
        );
    }
    out.push_str("</table><div class=\"plots\">\n");
    let series = |name: &str, values: &[f64]| Series {
        name: name.to_owned(),
        points: (1..).map(f64::from).zip(values.iter().copied()).collect(),
    };
    let plot = Plot {
        title: "Prompts in a second".to_owned(),
        x_label: "round",
        y_label: "prompts/s",
        series: vec![
            series("kvrail", &report.requests_per_second_of_rounds),
            series("raw", &report.raw_requests_per_second_of_rounds),
        ],
    };
    plot.write(out);
    out.push_str("</div>\n");
}

fn write_growth(growth: &GrowthReport, out: &mut String) {
    out.push_str("<h2>Growth</h2><div class=\"plots\">\n");
    type Pick = fn(&SizeReport) -> f64;
    let figures: [(&str, Pick); 5] = [
        ("open", |size| size.open_ms.ratio_to_smallest.median),
        ("present", |size| {
            size.lookup_present_ms.ratio_to_smallest.median
        }),
        ("missing", |size| {
            size.lookup_missing_ms.ratio_to_smallest.median
        }),
        ("store", |size| size.store_ms.ratio_to_smallest.median),
        ("load", |size| size.load_ms.ratio_to_smallest.median),
    ];
    let plot = Plot {
        title: "Time against the smallest store".to_owned(),
        x_label: "powers of ten of chunks",
        y_label: "ratio",
        series: figures
            .into_iter()
            .map(|(name, pick)| Series {
                name: name.to_owned(),
                points: growth
                    .sizes
                    .iter()
                    .map(|size| ((size.chunks as f64).log10(), pick(size)))
                    .collect(),
            })
            .collect(),
    };
    plot.write(out);
    out.push_str("</div>\n");
}

/// Returns all sides of an operation: what they are called, what they did, and how kvrail compares.
fn sides(operation: &OperationReport) -> Vec<(&str, &str, &SideReport, Option<f64>)> {
    let raw_ratio = Some(operation.ratio.median);
    let mut sides = vec![
        (
            "kvrail",
            "store with all its checks",
            &operation.kvrail,
            None,
        ),
        ("raw", operation.raw_does, &operation.raw, raw_ratio),
    ];
    for (name, limit) in [("memcpy", &operation.memcpy), ("fio", &operation.fio)] {
        if let Some(limit) = limit {
            sides.push((name, &limit.does, &limit.side, Some(limit.ratio.median)));
        }
    }
    sides
}

fn write_operation(name: &str, operation: &OperationReport, out: &mut String) {
    let sides = sides(operation);
    let _ = write!(
        out,
        "<h3>{name}</h3><table><tr><th>side</th><th>what it does</th>\
         <th class=\"number\">GB/s</th><th class=\"number\">CPU s/GB</th>\
         <th class=\"number\">kvrail against it</th></tr>"
    );
    for (side, does, figures, ratio) in &sides {
        let _ = write!(
            out,
            "<tr><td>{side}</td><td>{}</td><td class=\"number\">{}</td>\
             <td class=\"number\">{}</td><td class=\"number\">{}</td></tr>",
            escaped(does),
            short(figures.gb_per_second.median),
            short(figures.cpu_seconds_per_gb.median),
            ratio.map_or_else(String::new, short),
        );
    }
    out.push_str("</table><div class=\"plots\">\n");
    for plot in plots(name, &sides, &operation.kvrail) {
        plot.write(out);
    }
    out.push_str("</div>\n");
}

fn plots(
    name: &str,
    sides: &[(&str, &str, &SideReport, Option<f64>)],
    kvrail: &SideReport,
) -> Vec<Plot> {
    let each = |points: &dyn Fn(&SideReport) -> Vec<(f64, f64)>| -> Vec<Series> {
        let all = sides.iter().map(|(side, _, figures, _)| Series {
            name: (*side).to_owned(),
            points: points(figures),
        });
        all.filter(|series| !series.points.is_empty()).collect()
    };
    let numbered =
        |values: Vec<f64>| -> Vec<(f64, f64)> { (1..).map(f64::from).zip(values).collect() };
    let over_kvrail = |figures: &SideReport| {
        let pairs = kvrail.gb_per_second_of_rounds.iter();
        let pairs = pairs.zip(&figures.gb_per_second_of_rounds);
        numbered(pairs.map(|(kvrail, other)| kvrail / other).collect())
    };
    vec![
        Plot {
            title: format!("{name}: throughput over the rounds"),
            x_label: "round",
            y_label: "GB/s",
            series: each(&|figures| numbered(figures.gb_per_second_of_rounds.clone())),
        },
        Plot {
            title: format!("{name}: kvrail over each side"),
            x_label: "round",
            y_label: "ratio (kvrail itself is 1)",
            series: each(&over_kvrail),
        },
        Plot {
            title: format!("{name}: time of a chunk"),
            x_label: "ms",
            y_label: "% of chunks that were through",
            series: each(&|figures| {
                let percents = PERCENTS.map(|percent| percent as f64);
                let times = figures.chunk_percentiles_ms.iter().copied();
                times.zip(percents).collect()
            }),
        },
        Plot {
            title: format!("{name}: CPU time over the rounds"),
            x_label: "round",
            y_label: "CPU seconds per GB",
            series: each(&|figures| numbered(figures.cpu_seconds_per_gb_of_rounds.clone())),
        },
    ]
}
