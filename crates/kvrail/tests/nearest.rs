//! What a store says at start of the other namespaces on its path.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking; clippy spares only functions marked as tests"
)]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use kvrail::config::StoreConfig;
use kvrail::{Access, Namespace, OpenOptions, Store};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// An identity such as the connector's, with one value changed.
fn identity(at: &str, value: &Value) -> Namespace {
    let mut identity = json!({
        "engine": "vllm",
        "engine_version": "0.32.0",
        "weights": {"fingerprint": "aa"},
        "layout": "LBNHC",
        "attention": ["FLASH_ATTN"],
        "chunk_size": 256,
        "groups": [{"spec": "FullAttentionSpec", "fields": {"block_size": 16}}],
        "parallel": {"tensor": 1, "pipeline": 1},
        "prefix_hash": {"algorithm": "sha256", "none_hash": "00"},
    });
    if !at.is_empty() {
        *identity.pointer_mut(at).unwrap() = value.clone();
    }
    Namespace::new("org/model", identity.as_object().unwrap().clone()).unwrap()
}

/// Opens and closes a store; returns what it said of namespaces, and how long opening took.
fn open(path: &Path, namespace: &Namespace, options: OpenOptions) -> (Vec<String>, Duration) {
    let config = StoreConfig {
        buffer_mib: 4,
        disk_io_threads: 1,
        ..StoreConfig::with_path(path)
    };
    let start = Instant::now();
    let store = Store::open(&config, namespace.clone(), options).unwrap();
    let took = start.elapsed();
    let notices = store.take_notices().into_iter();
    let lines = notices
        .map(|notice| notice.message)
        .filter(|line| line.contains("shares nothing"));
    let lines = lines.collect();
    store.close(LIMIT).unwrap();
    (lines, took)
}

fn said(path: &Path, namespace: &Namespace) -> Vec<String> {
    open(path, namespace, OpenOptions::default()).0
}

#[test]
fn whatever_differs_is_named_at_start() {
    for (at, value, expected) in [
        (
            "/weights/fingerprint",
            json!("bb"),
            r#"identity.weights.fingerprint: "bb" here, "aa" there"#,
        ),
        (
            "/engine_version",
            json!("0.33.0"),
            r#"identity.engine_version: "0.33.0" here, "0.32.0" there"#,
        ),
        (
            "/layout",
            json!("BLHNC"),
            r#"identity.layout: "BLHNC" here, "LBNHC" there"#,
        ),
        (
            "/prefix_hash/none_hash",
            json!("01"),
            r#"identity.prefix_hash.none_hash: "01" here, "00" there"#,
        ),
        (
            "/groups/0/fields/block_size",
            json!(32),
            "identity.groups[0].fields.block_size: 32 here, 16 there",
        ),
        (
            "/parallel/tensor",
            json!(2),
            "identity.parallel.tensor: 2 here, 1 there",
        ),
    ] {
        let root = tempfile::tempdir().unwrap();
        let (before, after) = (identity("", &Value::Null), identity(at, &value));
        assert!(
            said(root.path(), &before).is_empty(),
            "the first one is alone"
        );
        let (ours, theirs) = (after.directory_name(), before.directory_name());
        let rest = format!("shares nothing with {theirs}, the only other one here: {expected}");
        assert_eq!(
            said(root.path(), &after),
            [format!("new namespace {ours} {rest}")]
        );
        // Later starts say it again: whoever wonders reads the last log.
        assert_eq!(
            said(root.path(), &after),
            [format!("namespace {ours} {rest}")]
        );
        let reading = OpenOptions {
            access: Access::ReadOnly,
            ..OpenOptions::default()
        };
        assert_eq!(open(root.path(), &after, reading).0.len(), 1);
        let quiet = OpenOptions {
            quiet: true,
            ..OpenOptions::default()
        };
        assert!(open(root.path(), &after, quiet).0.is_empty());
    }
}

#[test]
fn what_is_broken_beside_it_does_not_break_the_start() {
    let root = tempfile::tempdir().unwrap();
    let known = identity("/layout", &json!("BLHNC"));
    said(root.path(), &known);
    let broken = |number: u8| {
        let folder = root.path().join(format!("org-model-{number:016x}"));
        std::fs::create_dir(&folder).unwrap();
        folder.join("manifest.json")
    };
    std::fs::write(broken(0), "").unwrap();
    std::fs::write(broken(1), [0xff; 4096]).unwrap();
    std::fs::write(broken(2), "[".repeat(1 << 20)).unwrap();
    std::fs::create_dir(broken(3)).unwrap();
    symlink("/dev/zero", broken(4)).unwrap();
    // Nobody ever writes to it.
    rustix::fs::mknodat(
        rustix::fs::CWD,
        broken(5),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    std::fs::File::create(broken(6))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    drop(broken(7));
    let folder = root.path().join("org-model-0123456789abcdef");
    std::fs::write(folder, "a file").unwrap();
    let ours = identity("", &Value::Null);
    let (lines, took) = open(root.path(), &ours, OpenOptions::default());
    assert_eq!(lines.len(), 1, "{lines:?}");
    let expected = format!("{}, the only other one here", known.directory_name());
    assert!(lines.concat().contains(&expected), "{lines:?}");
    assert!(took < LIMIT, "{took:?}");
}
