//! `kvrail gc` as a user runs it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::Value;

const NAMESPACES: [&str; 2] = ["m-0123456789abcdef", "n-0123456789abcdef"];

fn kvrail(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvrail"))
        .arg("gc")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", stderr(output)))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn chunk(root: &Path, namespace: &str, index: u64) -> PathBuf {
    let name = format!("{:016x}", index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let folder = root.join(namespace).join("g0r0").join(&name[..3]);
    folder.join(format!("{name}.safetensors"))
}

/// Makes a store with two namespaces of 100 chunks, 0 to 99 hours old, and a file of somebody else.
fn store() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for namespace in NAMESPACES {
        std::fs::create_dir(root.path().join(namespace)).unwrap();
        std::fs::create_dir(root.path().join(namespace).join("tmp")).unwrap();
        std::fs::write(root.path().join(namespace).join("manifest.json"), "{}").unwrap();
        for index in 0..100 {
            let path = chunk(root.path(), namespace, index);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let file = File::create(path).unwrap();
            file.set_len(1000).unwrap();
            let age = Duration::from_secs(3600 * index + 60);
            file.set_modified(SystemTime::now() - age).unwrap();
        }
    }
    std::fs::create_dir_all(root.path().join("theirs/g0r0/abc")).unwrap();
    std::fs::write(
        root.path()
            .join("theirs/g0r0/abc/abcdef0123456789.safetensors"),
        "x",
    )
    .unwrap();
    root
}

fn count(root: &Path, namespace: &str) -> usize {
    (0..100)
        .filter(|index| chunk(root, namespace, *index).exists())
        .count()
}

#[test]
fn age_and_size_are_scoped_to_what_they_name() {
    let root = store();
    let path = root.path().to_str().unwrap();
    let output = kvrail(&[
        path,
        "--namespace",
        NAMESPACES[0],
        "--older-than",
        "50h",
        "--yes",
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["removed_for_age"]["chunks"], 50);
    assert_eq!(report["left"]["bytes"], 50_000);
    assert_eq!(
        (
            count(root.path(), NAMESPACES[0]),
            count(root.path(), NAMESPACES[1])
        ),
        (50, 100)
    );
    assert!((0..50).all(|index| chunk(root.path(), NAMESPACES[0], index).exists()));
    // The log says why; `explain` reads it.
    let gone = chunk(root.path(), NAMESPACES[0], 99);
    let key = gone.file_stem().unwrap().to_str().unwrap();
    let explained = Command::new(env!("CARGO_BIN_EXE_kvrail"))
        .args(["explain", path, key, "--namespace", NAMESPACES[0]])
        .output()
        .unwrap();
    let text = String::from_utf8(explained.stdout.clone()).unwrap();
    assert!(
        text.contains("chunk 0  evicted  ") && text.contains("kvrail gc was asked to"),
        "{text}{}",
        stderr(&explained)
    );
    let output = kvrail(&[path, "--to", "30kB", "--yes", "--json"]);
    assert_eq!(
        json(&output)["removed_for_size"]["chunks"],
        120,
        "{}",
        stderr(&output)
    );
    // The youngest of both.
    assert!(NAMESPACES.iter().all(|name| count(root.path(), name) == 15));
    assert!(
        root.path()
            .join("theirs/g0r0/abc/abcdef0123456789.safetensors")
            .exists()
    );
    let output = kvrail(&[path]);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(text.starts_with("found 30 chunks (29.3 KiB)\n"), "{text}");
    assert!(text.ends_with("left 30 chunks (29.3 KiB)\n"), "{text}");
}

#[test]
fn nothing_is_removed_without_a_yes_or_in_a_dry_run() {
    let root = store();
    let path = root.path().to_str().unwrap();
    let output = kvrail(&[path, "--to", "0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("not confirmed: remove 200 chunks (195.3 KiB)?"),
        "{}",
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("give --yes"),
        "{}",
        stderr(&output)
    );
    let output = kvrail(&[path, "--to", "0", "--dry-run", "--json"]);
    assert_eq!(json(&output)["removed_for_size"]["chunks"], 200);
    assert_eq!(json(&output)["dry_run"], true);
    assert!(
        NAMESPACES
            .iter()
            .all(|name| count(root.path(), name) == 100)
    );
}

#[test]
fn leftovers_and_empty_folders_go_without_being_asked_for() {
    let root = store();
    let leftover = root
        .path()
        .join(NAMESPACES[0])
        .join("tmp/.chunk.elsewhere-1.5.5.0");
    let file = File::create(&leftover).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(7200))
        .unwrap();
    std::fs::create_dir_all(root.path().join(NAMESPACES[1]).join("g0r0/fff")).unwrap();
    let output = kvrail(&[root.path().to_str().unwrap(), "--json"]);
    let report = json(&output);
    assert_eq!(report["leftovers_removed"], 1);
    assert!(report["folders_removed"].as_u64().unwrap() >= 1);
    assert!(!leftover.exists());
    assert!(
        NAMESPACES
            .iter()
            .all(|name| count(root.path(), name) == 100)
    );
}

#[test]
fn what_is_no_store_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    for arguments in [&[path, "--to", "0", "--yes"][..], &["/nowhere", "--yes"]] {
        let output = kvrail(arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("hint: "), "{}", stderr(&output));
    }
    let root = store();
    let path = root.path().to_str().unwrap();
    let output = kvrail(&[path, "--namespace", "theirs", "--to", "0", "--yes"]);
    assert!(
        stderr(&output).contains("no namespace `theirs`"),
        "{}",
        stderr(&output)
    );
    for wrong in [["--to", "5G"], ["--older-than", "2 weeks"]] {
        let output = kvrail(&[path, wrong[0], wrong[1], "--yes"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("expected"), "{}", stderr(&output));
    }
    assert!(
        NAMESPACES
            .iter()
            .all(|name| count(root.path(), name) == 100)
    );
}
