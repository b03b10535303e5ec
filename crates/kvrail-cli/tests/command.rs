//! The program as a user runs it: output, exit codes and messages.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{CHUNKS, LIMIT, chunk_paths, json, kvrail, path_of, stderr, stdout, store};
use serde_json::Value;

#[test]
fn ls_counts_chunks_tokens_and_bytes() {
    let directory = store();
    let output = kvrail(&["ls", path_of(&directory), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let listing = json(&output);
    let group = &listing["namespaces"][0]["groups"][0];
    assert_eq!(group["group"], 0);
    assert_eq!(group["rank"], 0);
    assert_eq!(group["chunks"], CHUNKS);
    assert_eq!(group["tokens"], u64::from(CHUNKS) * 256);
    assert!(
        group["newest_age_seconds"].as_u64().unwrap() < 600,
        "{group}"
    );
    assert!(group.get("chunk_files").is_none());

    let files = chunk_paths(&directory);
    assert_eq!(files.len(), usize::from(CHUNKS));
    let bytes: u64 = files
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    assert_eq!(group["bytes"], bytes);

    let text = stdout(&kvrail(&["ls", path_of(&directory), "--chunks"]));
    let name = listing["namespaces"][0]["name"].as_str().unwrap();
    assert!(text.starts_with("NAMESPACE"), "{text}");
    assert!(
        text.lines()
            .any(|line| line.starts_with(name) && line.contains("1280")),
        "{text}"
    );
    assert!(text.contains(files[3].to_str().unwrap()), "{text}");
}

#[test]
fn stat_shows_totals_leftovers_and_identity() {
    let directory = store();
    let listing = json(&kvrail(&["ls", path_of(&directory), "--json"]));
    let namespace = PathBuf::from(listing["namespaces"][0]["directory"].as_str().unwrap());
    // What is not ours in a quarantine is not counted.
    let aside = |key: &str| format!("00000000000000000001-g0r0-{key}.safetensors");
    let (first, second) = (aside(&"ab".repeat(16)), aside(&"cd".repeat(16)));
    for (folder, name) in [
        ("tmp", ".a"),
        ("quarantine", &first),
        ("quarantine", &second),
        ("quarantine", "notes"),
    ] {
        std::fs::create_dir_all(namespace.join(folder)).unwrap();
        std::fs::write(namespace.join(folder).join(name), "left").unwrap();
    }
    let found = json(&kvrail(&["stat", path_of(&directory), "--json"]));
    let statistics = &found["namespaces"][0];
    assert_eq!(statistics["chunks"], CHUNKS);
    assert_eq!(
        statistics["bytes"],
        listing["namespaces"][0]["groups"][0]["bytes"]
    );
    assert_eq!(statistics["temporary_files"], 1);
    assert_eq!(statistics["quarantined"], 2);
    assert!(
        statistics["identity"].to_string().contains("bfloat16"),
        "{statistics}"
    );
    assert!(found["file_system"]["available_bytes"].as_u64().unwrap() > 0);

    let text = stdout(&kvrail(&["stat", path_of(&directory)]));
    for expected in ["chunks       5 (", "quarantined  2", "free  ", "bfloat16"] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn verify_passes_a_whole_store() {
    let directory = store();
    let output = kvrail(&["verify", path_of(&directory), "--json", "--threads", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let verification = json(&output);
    assert_eq!(verification["checked"], CHUNKS);
    assert_eq!(verification["damaged"], Value::Array(Vec::new()));
    assert!(
        stderr(&output).is_empty(),
        "no progress bar where stderr is no terminal"
    );
    let text = stdout(&kvrail(&["verify", path_of(&directory)]));
    assert!(
        text.contains("checked 5 chunks") && text.contains("0 damaged"),
        "{text}"
    );
}

#[test]
fn verify_names_the_chunk_with_a_flipped_byte_and_changes_nothing() {
    let directory = store();
    let path = chunk_paths(&directory).remove(2);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 9000] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let output = kvrail(&["verify", path_of(&directory), "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let verification = json(&output);
    let damaged = verification["damaged"].as_array().unwrap();
    assert_eq!(damaged.len(), 1);
    assert_eq!(damaged[0]["path"], path.to_str().unwrap());
    let reason = damaged[0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("checksum") && !reason.contains('/'),
        "{reason}"
    );
    assert_eq!(
        std::fs::read(&path).unwrap(),
        bytes,
        "verify changes nothing"
    );

    let output = kvrail(&["verify", path_of(&directory)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).starts_with(&format!("damaged  {}", path.display())));
}

#[test]
fn verify_reports_truncated_and_swapped_chunks_and_a_broken_manifest() {
    let directory = store();
    let files = chunk_paths(&directory);
    let bytes = std::fs::read(&files[0]).unwrap();
    std::fs::write(&files[0], &bytes[..bytes.len() - 4096]).unwrap();
    std::fs::copy(&files[1], &files[2]).unwrap();
    let verification = json(&kvrail(&["verify", path_of(&directory), "--json"]));
    let damaged = verification["damaged"].as_array().unwrap();
    let paths: Vec<&str> = damaged
        .iter()
        .map(|damage| damage["path"].as_str().unwrap())
        .collect();
    assert_eq!(
        paths,
        [files[0].to_str().unwrap(), files[2].to_str().unwrap()]
    );

    let namespace = files[0].ancestors().nth(3).unwrap();
    std::fs::write(namespace.join("manifest.json"), "{").unwrap();
    let output = kvrail(&["verify", path_of(&directory), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output)["unchecked"], CHUNKS);
    assert_eq!(kvrail(&["ls", path_of(&directory)]).status.code(), Some(0));
}

#[test]
fn what_is_no_store_is_a_clear_error() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let cases = [
        (
            directory.path().to_path_buf(),
            "error: not a kvrail store: ",
        ),
        (directory.path().join("missing"), "error: open: "),
        (file, "error: not a directory: "),
    ];
    for command in ["ls", "stat", "verify"] {
        for (path, expected) in &cases {
            let output = kvrail(&[command, path.to_str().unwrap()]);
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{text}");
            assert!(stdout(&output).is_empty());
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), 2, "{text}");
            assert!(lines[0].starts_with(expected), "{text}");
            assert!(lines[1].starts_with("hint: "), "{text}");
        }
    }
    let inside = store();
    let mut folders = std::fs::read_dir(inside.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let namespace = folders
        .find(|folder| folder.join("manifest.json").is_file())
        .unwrap();
    let output = kvrail(&["ls", namespace.to_str().unwrap()]);
    assert!(
        stderr(&output).contains("hint: this is one namespace"),
        "{}",
        stderr(&output)
    );
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
fn the_clean_up_of_bench_removes_nothing_else() {
    let directory = store();
    let output = kvrail(&["bench-cleanup", path_of(&directory)]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(chunk_paths(&directory).len(), usize::from(CHUNKS));
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = kvrail(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        for command in ["ls", "stat", "verify", "bench", "completions"] {
            assert!(stdout(&output).contains(command), "{command} for {shell}");
        }
    }
}

#[test]
fn help_documents_the_exit_codes() {
    for arguments in [vec!["--help"], vec!["verify", "--help"]] {
        assert!(stdout(&kvrail(&arguments)).contains("Exit codes:"));
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let directory = store();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_kvrail"))
        .args(["ls", path_of(&directory)])
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).is_empty(), "{}", stderr(&output));
}
