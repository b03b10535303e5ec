//! What the tests of the command share: running it, and a store to run it on.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::{
    ChunkKey, ChunkRef, KvLayout, LayerSpan, Namespace, OpenOptions, Region, Store, StoreChunk,
};
use serde_json::Value;

pub const LIMIT: Duration = Duration::from_secs(60);
pub const BLOCK_BYTES: usize = 8192;
pub const LAYERS: usize = 2;
pub const CHUNKS: u8 = 5;

pub fn kvrail(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvrail"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", stdout(output), stderr(output)))
}

/// Makes a store with five chunks of 256 tokens, two blocks and two layers.
pub fn make_store(path: &Path) {
    make_namespace(path, "bfloat16");
}

/// Makes a namespace of its own for a data type, with the same five chunks.
pub fn make_namespace(path: &Path, dtype: &str) {
    let config = StoreConfig {
        gds_backend: GdsBackend::Posix,
        buffer_mib: 4,
        disk_io_threads: 2,
        ..StoreConfig::with_path(path)
    };
    let identity = serde_json::from_str(&format!(r#"{{"kv_dtype": "{dtype}"}}"#)).unwrap();
    let namespace = Namespace::new("test/model", identity).unwrap();
    let store = Store::open(&config, namespace, OpenOptions::default()).unwrap();
    let memory = Region::zeroed(LAYERS * 2 * BLOCK_BYTES).unwrap();
    let bytes: Vec<u8> = (0..memory.bytes())
        .map(|index| (index % 251) as u8)
        .collect();
    memory.copy_in(0, &bytes).unwrap();
    let layers = (0..LAYERS)
        .map(|layer| LayerSpan {
            region: 0,
            offset: layer * 2 * BLOCK_BYTES,
            block_stride: BLOCK_BYTES,
            block_bytes: BLOCK_BYTES,
        })
        .collect();
    let layout = KvLayout::new(layers, 2, &[memory.bytes()]).unwrap();
    let kv_cache = store.attach(0, 0, layout, vec![memory], 2).unwrap();
    let mut parent = None;
    for number in 0..CHUNKS {
        let key = key(number);
        let chunk = StoreChunk {
            chunk: ChunkRef { key, parent },
            blocks: vec![0, 1],
        };
        let report = kv_cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap();
        assert_eq!(report.stored, 1, "{report:?}");
        parent = Some(key);
    }
    store.close(LIMIT).unwrap();
}

/// The key of the chunk with this number.
pub fn key(number: u8) -> ChunkKey {
    ChunkKey::from_bytes(&[number * 16 + 1; 32]).unwrap()
}

pub fn store() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    make_store(directory.path());
    directory
}

pub fn path_of(directory: &tempfile::TempDir) -> &str {
    directory.path().to_str().unwrap()
}

/// Returns the chunk files as `ls --chunks` lists them.
pub fn chunk_paths(directory: &tempfile::TempDir) -> Vec<PathBuf> {
    let listing = json(&kvrail(&["ls", path_of(directory), "--chunks", "--json"]));
    let files = listing["namespaces"][0]["groups"][0]["chunk_files"]
        .as_array()
        .unwrap()
        .clone();
    files
        .iter()
        .map(|file| PathBuf::from(file["path"].as_str().unwrap()))
        .collect()
}
