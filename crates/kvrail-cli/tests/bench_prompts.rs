//! `kvrail bench` with prompts, and with several paths.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

mod common;

use common::{json, kvrail, path_of, stderr};
use serde_json::Value;
use tempfile::TempDir;

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

/// Runs a small benchmark on some paths.
fn bench(paths: &[TempDir], options: &[&str]) -> std::process::Output {
    let mut arguments = vec!["bench", "--model", "synthetic-256k", "--json"];
    for path in paths {
        arguments.extend(["--path", path_of(path)]);
    }
    arguments.extend(["--threads", "2", "--buffer-mib", "64", "--memory-mib", "24"]);
    arguments.extend(options);
    kvrail(&arguments)
}

fn is_empty(path: &TempDir) -> bool {
    std::fs::read_dir(path.path()).unwrap().next().is_none()
}

#[test]
fn prompts_are_answered_on_two_paths_and_leave_nothing_behind() {
    let paths = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let page = tempfile::NamedTempFile::new().unwrap();
    let page = page.path().to_str().unwrap();
    let output = bench(
        &paths,
        &[
            "--prompts",
            "system",
            "--requests",
            "12",
            "--rounds",
            "2",
            "--engine",
            "posix,uring",
            "--html",
            page,
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["models"].as_array().unwrap().len(), 0);
    let found = report["prompts"].as_array().unwrap();
    assert_eq!(found.len(), 2, "one for each engine");
    for found in found {
        // Most of a system prompt comes again, and a question never does.
        let hit_rate = number(&found["hit_rate"]);
        assert!((0.3..0.95).contains(&hit_rate), "{hit_rate}");
        assert!(number(&found["verified_chunks"]) > 24.0);
        assert_eq!(found["lost_chunks"], 0);
        for figure in [
            "requests_per_second",
            "loaded_gb_per_second",
            "stored_gb_per_second",
            "ratio",
        ] {
            assert!(number(&found[figure]["min"]) > 0.0, "{figure}: {found}");
        }
        assert!(number(&found["lookup_p50_ms"]) <= number(&found["hit_p99_ms"]));
        let shares = found["chunks_of_paths"].as_array().unwrap();
        let shares: Vec<f64> = shares.iter().map(number).collect();
        assert!(shares.iter().all(|share| *share > 0.0), "{shares:?}");
    }
    assert_eq!(
        found[0]["hit_rate"], found[1]["hit_rate"],
        "both had the same prompts"
    );
    assert!(number(&found[1]["ratio_to_first"]["median"]) > 0.0);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(
        page.contains("prompts (system)") && page.contains("<svg"),
        "{page}"
    );
    assert!(paths.iter().all(is_empty));
}

#[test]
fn with_a_limit_chunks_are_evicted_and_nothing_is_compared_with_bare_files() {
    let paths = [tempfile::tempdir().unwrap()];
    let output = bench(
        &paths,
        &[
            "--prompts",
            "once",
            "--requests",
            "8",
            "--rounds",
            "1",
            "--max-size",
            "64MiB",
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = &json(&output)["prompts"][0];
    assert_eq!(found["ratio"], Value::Null);
    assert_eq!(found["hit_rate"], 0.0, "such prompts never come again");
    let kept = number(&found["chunks_of_paths"][0]);
    assert!((1.0..=256.0).contains(&kept), "{kept} chunks of 256 KiB");
    assert!(is_empty(&paths[0]));
}

#[test]
fn the_usual_measurement_goes_over_two_paths() {
    let paths = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let output = bench(&paths, &["--chunks", "16", "--rounds", "1", "--mix", "0.5"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("several paths"),
        "{}",
        stderr(&output)
    );
    let model = &json(&output)["models"][0];
    assert_eq!(model["verified_chunks"], 32);
    assert!(number(&model["store"]["ratio"]["median"]) > 0.0);
    assert!(model["store"].get("fio").is_none());
    assert!(paths.iter().all(is_empty));
}

#[test]
fn options_that_do_not_go_with_prompts_are_refused() {
    let paths = [tempfile::tempdir().unwrap()];
    for options in [
        ["--prompts", "rag", "--cache", "warm"].as_slice(),
        ["--prompts", "rag", "--mix", "0.5"].as_slice(),
        ["--max-size", "1GB"].as_slice(),
        ["--prompts", "rag", "--memory-mib", "1"].as_slice(),
    ] {
        let output = bench(&paths, options);
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        let text = stderr(&output);
        assert!(
            text.contains("--prompts") || text.contains("--memory-mib"),
            "{text}"
        );
    }
    assert!(is_empty(&paths[0]));
}
