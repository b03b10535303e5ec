//! The program as a user runs it: output, exit codes and messages.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::{CHUNKS, chunk_paths, json, kvrail, path_of, stderr, stdout, store};
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
