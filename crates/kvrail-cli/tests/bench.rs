//! `kvrail bench` as a user runs it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{LIMIT, json, kvrail, path_of, stderr, stdout};
use serde_json::Value;
use tempfile::TempDir;

/// Runs a small benchmark below a directory.
fn bench(directory: &TempDir, options: &[&str]) -> std::process::Output {
    let mut arguments = vec!["bench", "--path", path_of(directory), "--threads", "2"];
    arguments.extend(["--rounds", "2", "--buffer-mib", "64", "--memory-mib", "24"]);
    arguments.extend(options);
    kvrail(&arguments)
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

#[test]
fn bench_measures_verifies_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = [
        "bench",
        "--path",
        path_of(&directory),
        "--model",
        "smollm2-135m",
        "--chunks",
        "4",
        "--rounds",
        "2",
        "--threads",
        "2",
        "--buffer-mib",
        "64",
        "--memory-mib",
        "24",
        "--engine",
        "posix,uring",
        "--no-fio",
        "--json",
    ];
    let output = kvrail(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(
        report["models"].as_array().unwrap().len(),
        2,
        "one for each engine"
    );
    assert_eq!(report.get("fio"), None, "{report}");
    let second = &report["models"][1];
    // Where there is no io_uring, the store has said why and taken posix.
    let reason = second["engine_reason"].as_str().unwrap();
    assert!(
        second["engine"] == "uring" || reason.contains("io_engine is uring, but"),
        "{reason}"
    );
    assert!(second["load"]["ratio_to_first"]["median"].as_f64().unwrap() > 0.0);
    let model = &report["models"][0];
    assert_eq!(model["engine"], "posix");
    assert_eq!(model["store"].get("ratio_to_first"), None);
    assert_eq!(model["model"], "smollm2-135m");
    assert_eq!(model["payload_bytes"], 23_040 * 256);
    assert_eq!(
        model["chunks_in_memory"], 2,
        "4 chunks go through the memory of 2"
    );
    assert_eq!(
        model["verified_chunks"],
        4 * 3,
        "two rounds and the one that warms up"
    );
    assert_eq!(model["retries"], 0);
    for operation in ["store", "load"] {
        let found = &model[operation];
        for side in ["kvrail", "raw"] {
            assert!(found[side]["gb_per_second"]["median"].as_f64().unwrap() > 0.0);
            assert!(
                found[side]["cpu_seconds_per_gb"]["median"]
                    .as_f64()
                    .unwrap()
                    > 0.0
            );
            let (p50, p99) = (&found[side]["chunk_p50_ms"], &found[side]["chunk_p99_ms"]);
            assert!(
                p50.as_f64().unwrap() > 0.0 && p50.as_f64() <= p99.as_f64(),
                "{found}"
            );
        }
        let ratio = &found["ratio"];
        assert!(ratio["min"].as_f64().unwrap() > 0.0);
        assert!(ratio["min"].as_f64() <= ratio["median"].as_f64());
        assert!(ratio["median"].as_f64() <= ratio["max"].as_f64());
    }
    assert_eq!(report["lookup"]["chunks"], 512);
    assert!(report["lookup"]["present_ms"]["median"].as_f64().unwrap() > 0.0);
    assert!(report["lookup"]["missing_ms"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_killed_bench_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvrail"))
        .args([
            "bench",
            "--path",
            path_of(&directory),
            "--model",
            "smollm2-135m",
        ])
        .args([
            "--chunks",
            "4",
            "--rounds",
            "1000",
            "--memory-mib",
            "64",
            "--buffer-mib",
            "64",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let entries = || std::fs::read_dir(directory.path()).unwrap().count();
    let end = Instant::now() + LIMIT;
    let has_files = || {
        let scratch = std::fs::read_dir(directory.path()).unwrap().next();
        scratch.is_some_and(|entry| entry.unwrap().path().join("smollm2-135m/store-0").exists())
    };
    while !has_files() {
        assert!(Instant::now() < end, "bench never started");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let end = Instant::now() + LIMIT;
    while entries() > 0 {
        assert!(Instant::now() < end, "the directory of bench stayed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn bench_refuses_what_cannot_work() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_of(&directory);
    let missing = format!("{path}/missing");
    for (arguments, expected) in [
        (
            vec!["--path", &missing, "--model", "deepseek-v3"],
            "error: open: ",
        ),
        (
            vec![
                "--path",
                path,
                "--model",
                "llama-3.1-8b",
                "--memory-mib",
                "8",
            ],
            "--memory-mib",
        ),
        (
            vec!["--path", path, "--model", "all", "--chunks", "1000000000"],
            "are needed",
        ),
        (
            vec!["--path", path, "--model", "gpt-2"],
            "invalid value 'gpt-2'",
        ),
    ] {
        let output = kvrail(&[&["bench"], arguments.as_slice()].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn warm_loads_are_measured_against_the_page_cache_and_plain_copies() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = ["--model", "smollm2-135m", "--chunks", "4", "--no-fio"];
    let warm = ["--cache", "warm", "--direct-io", "off", "--json"];
    let output = bench(&directory, &[&options[..], &warm].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    let model = &report["models"][0];
    assert_eq!(model["loaded_from"], "page cache");
    assert_eq!(model["direct"], false);
    assert_eq!(model["raw_direct"], false);
    assert_eq!(model["memory_share"], 0.0);
    assert_eq!(model["verified_chunks"], 4 * 3);
    let load = &model["load"];
    assert_eq!(load["raw_does"], "read from the page cache");
    let memcpy = &load["memcpy"];
    assert!(number(&memcpy["ratio"]["median"]) > 0.0, "{load}");
    assert_eq!(
        memcpy["gb_per_second_of_rounds"].as_array().unwrap().len(),
        2
    );
    assert_eq!(model["store"].get("memcpy"), None);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn loads_from_the_dram_tier_are_measured_against_plain_copies() {
    let directory = tempfile::tempdir().unwrap();
    let options = ["--model", "smollm2-135m", "--chunks", "4", "--no-fio"];
    let memory = |gigabytes: &'static str, output: &'static str| {
        let options = [&options[..], &["--local-cpu", gigabytes, output]].concat();
        let output = bench(&directory, &options);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output
    };
    let report = json(&memory("0.1", "--json"));
    let model = &report["models"][0];
    assert_eq!(model["loaded_from"], "memory");
    assert_eq!(model["memory_share"], 1.0, "{model}");
    assert_eq!(model["load"]["raw_does"], "memcpy");
    // 100 MB and 64 MiB are touched by 8 rounds of 4 chunks.
    assert_eq!(model["warm_up_rounds"], 8);
    assert_eq!(model["verified_chunks"], 4 * 10);
    assert!(number(&model["load"]["ratio"]["median"]) > 0.0);
    // One chunk fits into this tier, so it is said that most came from files.
    let report = json(&memory("0.0065", "--json"));
    let share = number(&report["models"][0]["memory_share"]);
    assert!(share < 0.5, "{share}");

    // The same in memory that processes share, of which nothing is left behind.
    if let Ok(memory) = tempfile::tempdir_in("/dev/shm") {
        let shared = memory.path().to_str().unwrap();
        let shared = ["--local-cpu", "0.1", "--local-cpu-shared", shared, "--json"];
        let output = bench(&directory, &[&options[..], &shared].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let model = &json(&output)["models"][0];
        assert_eq!(model["loaded_from"], "shared memory");
        assert!(number(&model["memory_share"]) > 0.7, "{model}");
        assert_eq!(std::fs::read_dir(memory.path()).unwrap().count(), 0);
    } else {
        eprintln!("skipped: /dev/shm cannot be written here");
    }

    let output = bench(
        &directory,
        &[&options[..], &["--local-cpu", "1", "--cache", "warm"]].concat(),
    );
    assert_eq!(output.status.code(), Some(2));
    let output = bench(&directory, &[&options[..], &["--local-cpu", "0"]].concat());
    assert!(
        stderr(&output).contains("a number of GB"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn fio_does_the_same_work_in_the_same_rounds() {
    // On a disk rather than in memory, where requests go in parallel.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if Command::new("fio").arg("--version").output().is_err() {
        eprintln!("skipped: fio is not installed");
        return;
    }
    let options = ["--model", "smollm2-135m", "--chunks", "5", "--json"];
    let output = bench(&directory, &options);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert!(report["fio"].as_str().unwrap().starts_with("fio-"));
    let model = &report["models"][0];
    for operation in ["store", "load"] {
        let fio = &model[operation]["fio"];
        assert_eq!(fio["gb_per_second_of_rounds"].as_array().unwrap().len(), 2);
        assert!(number(&fio["ratio"]["min"]) > 0.0, "{fio}");
        assert!(fio["does"].as_str().unwrap().contains("2 jobs"), "{fio}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn without_fio_one_line_says_so_and_the_rest_is_measured() {
    let directory = tempfile::tempdir().unwrap();
    let options = ["--model", "smollm2-135m", "--chunks", "2"];
    let output = bench(
        &directory,
        &[&options[..], &["--fio", "/nonexistent/fio"]].concat(),
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stderr(&output),
        "`/nonexistent/fio` is not there: measured without fio\n"
    );
    let text = stdout(&output);
    assert!(
        text.contains("smollm2-135m") && !text.contains("FIO"),
        "{text}"
    );
}

#[test]
fn a_fio_that_fails_ends_the_run_with_its_reason_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let tools = tempfile::tempdir().unwrap();
    let fio = tools.path().join("fio");
    script(
        &fio,
        "case $1 in --version) echo fio-9;; *) echo 'fio: no such engine' >&2; exit 3;; esac",
    );
    let options = ["--model", "smollm2-135m", "--chunks", "2", "--fio"];
    let output = bench(
        &directory,
        &[&options[..], &[fio.to_str().unwrap()]].concat(),
    );
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(
        text.contains("fio: no such engine") && text.contains("--no-fio"),
        "{text}"
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn the_page_needs_nothing_else_and_holds_the_figures_of_the_json() {
    let directory = tempfile::tempdir().unwrap();
    let results = tempfile::tempdir().unwrap();
    let json_path = results.path().join("<b>'results' & more.json");
    let html_path = results.path().join("page.html");
    let options = ["--model", "smollm2-135m", "--chunks", "3", "--no-fio"];
    let paths = [
        "--json",
        json_path.to_str().unwrap(),
        "--html",
        html_path.to_str().unwrap(),
    ];
    let output = bench(&directory, &[&options[..], &paths].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = std::fs::read_to_string(html_path).unwrap();
    for reference in [
        "http", "src=", "href", "url(", "@import", "<script", "<link", "<b>",
    ] {
        assert!(!page.contains(reference), "{reference} in {page}");
    }
    assert_well_formed(&page);
    assert_eq!(page.matches("<svg").count(), 2 * 4);
    let text = std::fs::read_to_string(&json_path).unwrap();
    let (_, shown) = page.split_once("<pre>").unwrap();
    let (shown, _) = shown.split_once("</pre>").unwrap();
    assert_eq!(unescaped(shown), text.trim_end());
    let report: Value = serde_json::from_str(&text).unwrap();
    assert!(number(&report["machine"]["memory_bytes"]) > 0.0);
    let command = report["machine"]["command"].as_str().unwrap();
    assert!(
        command.contains("bench --path") && command.contains(r"'\''results'\''"),
        "{command}"
    );
    // The plots as well: a point of each round, on the axis of its number.
    let rates = &report["models"][0]["load"]["kvrail"]["gb_per_second_of_rounds"];
    for round in 1..=2 {
        let point = format!("<title>kvrail: {round}, ");
        assert!(page.matches(&point).count() >= 4, "{point}: {rates}");
    }
}

#[test]
fn a_mix_loads_and_stores_at_the_same_time() {
    let directory = tempfile::tempdir().unwrap();
    let options = ["--model", "synthetic-256k", "--chunks", "10", "--no-fio"];
    let output = bench(
        &directory,
        &[&options[..], &["--mix", "0.7", "--json"]].concat(),
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let model = &json(&output)["models"][0];
    assert_eq!(model["mix_share"], 0.7);
    for side in ["kvrail", "raw"] {
        let side = &model["mix"][side];
        assert!(number(&side["gb_per_second"]["min"]) > 0.0, "{side}");
        assert!(number(&side["chunk_p50_ms"]) > 0.0, "{side}");
    }
    assert!(number(&model["mix"]["ratio"]["median"]) > 0.0);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let output = bench(&directory, &[&options[..], &["--mix", "1.5"]].concat());
    assert!(
        stderr(&output).contains("from 0 to 1"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn growth_opens_stores_of_each_size_in_processes_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let output = bench(&directory, &["--growth", "4000,600", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["models"].as_array().unwrap().len(), 0);
    assert_eq!(report.get("lookup"), None);
    let growth = &report["growth"];
    assert_eq!(
        growth["rounds"], 5,
        "at least five, though two were asked for"
    );
    let sizes = growth["sizes"].as_array().unwrap();
    assert_eq!(
        (&sizes[0]["chunks"], &sizes[1]["chunks"]),
        (&600.into(), &4000.into())
    );
    for size in sizes {
        let figures = [
            "open_ms",
            "lookup_present_ms",
            "lookup_missing_ms",
            "store_ms",
            "load_ms",
        ];
        for figure in figures {
            assert!(number(&size[figure]["median"]) > 0.0, "{figure}: {size}");
            assert!(
                number(&size[figure]["ratio_to_smallest"]["median"]) > 0.0,
                "{figure}: {size}"
            );
        }
        let bytes = number(&size["open_bytes"]["median"]);
        assert!((1.0..1e9).contains(&bytes), "{size}");
    }
    assert_eq!(
        number(&sizes[0]["open_ms"]["ratio_to_smallest"]["max"]),
        1.0
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

fn unescaped(text: &str) -> String {
    let text = text.replace("&lt;", "<").replace("&gt;", ">");
    let text = text.replace("&quot;", "\"").replace("&#39;", "'");
    text.replace("&amp;", "&")
}

/// Checks that each tag is ended, in the order of their nesting; text has no `<` of its own.
fn assert_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for part in page
        .strip_prefix("<!DOCTYPE html>")
        .unwrap()
        .split('<')
        .skip(1)
    {
        let (tag, text) = part.split_once('>').unwrap();
        assert!(!text.contains('>'), "{part}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "in {tag}");
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert_eq!(open, Vec::<&str>::new());
}

fn script(path: &Path, body: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}
