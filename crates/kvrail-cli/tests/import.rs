//! `kvrail import` as a user runs it.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::Path;

use common::{LIMIT, json, kvrail, stderr, stdout};
use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::layout::{SideOrder, TokenOrder, TokenShape};
use kvrail::lmcache::{Element, FileKind, FilePlace, LmcacheKey, MemoryFormat, TensorHead};
use kvrail::{
    ChunkKey, ChunkRef, KvLayout, LayerSpan, LoadChunk, Namespace, OpenOptions, Region, Store,
};
use serde_json::json as value;

const LAYERS: usize = 2;
const BLOCK_BYTES: usize = 2 * 16 * 2 * 8 * 4;
const BLOCKS: usize = 4;
const PAYLOAD_BYTES: usize = LAYERS * BLOCKS * BLOCK_BYTES;

fn order() -> TokenOrder {
    let shape = TokenShape {
        layers: LAYERS,
        tokens: 16,
        heads: 2,
        head_size: 8,
        element_bytes: 4,
    };
    let side = |offset| SideOrder {
        offset,
        head_stride: 64,
        token_stride: 128,
        element_stride: 4,
    };
    TokenOrder::new(shape, vec![side(0), side(32)]).unwrap()
}

fn open(path: &Path) -> Store {
    let config = StoreConfig {
        gds_backend: GdsBackend::Posix,
        buffer_mib: 4,
        chunk_size: 64,
        ..StoreConfig::with_path(path)
    };
    let identity = value!({
        "chunk_size": 64,
        "groups": [{"layers": [["a", BLOCK_BYTES], ["b", BLOCK_BYTES]]}],
        "lmcache": {
            "model": "org/model", "workers": 2, "element": "float", "has_sign": true,
            "block_tokens": 16, "heads": 2, "head_size": 8, "element_bytes": 4,
            "sides": [[0, 64, 128, 4], [32, 64, 128, 4]],
        },
    });
    let identity = identity.as_object().unwrap().clone();
    let namespace = Namespace::new("model", identity).unwrap();
    Store::open(&config, namespace, OpenOptions::default()).unwrap()
}

fn head(tokens: usize) -> TensorHead {
    TensorHead::new(Element::F32, &[2, LAYERS, tokens, 16], MemoryFormat::Kv2ltd).unwrap()
}

fn payload(seed: usize) -> Vec<u8> {
    (0..PAYLOAD_BYTES)
        .map(|at| (at * (2 * seed + 1) + at / 253) as u8)
        .collect()
}

/// Writes a file of LMCache's and its metadata.
fn put(root: &Path, key: &str, head: &TensorHead, content: &[u8]) -> std::path::PathBuf {
    let mut place = FilePlace {
        key: LmcacheKey::parse(key).unwrap(),
        is_on_weka: false,
        kind: FileKind::Metadata,
    };
    let folder = root.join(place.folder());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(place.name().unwrap()), head.encode()).unwrap();
    place.kind = FileKind::Chunk;
    let path = folder.join(place.name().unwrap());
    std::fs::write(&path, [&head.encode()[..], content].concat()).unwrap();
    path
}

#[test]
fn chunks_are_copied_once_and_what_does_not_fit_is_counted() {
    let source = tempfile::tempdir().unwrap();
    let store = tempfile::tempdir().unwrap();
    open(store.path()).close(LIMIT).unwrap();
    let tree = source.path();
    for (number, key) in ["1f00", "-1f00", "7fffffffffffffff"].iter().enumerate() {
        let worker = number % 2;
        let key = format!("org/model@2@{worker}@{key}@float");
        put(tree, &key, &head(64), &payload(number));
    }
    put(
        tree,
        "org/model@2@0@2f00@float",
        &head(32),
        &payload(7)[..PAYLOAD_BYTES / 2],
    );
    put(tree, "org/other@2@0@1f00@float", &head(64), &payload(7));
    put(tree, "org/model@4@0@1f00@float", &head(64), &payload(7));
    put(
        tree,
        "org/model@2@0@ffffffffffffffff@float",
        &head(64),
        &payload(7),
    );
    put(tree, "org/model@2@0@3f00@float@1", &head(64), &payload(7));
    put(
        tree,
        "org/model@2@0@4f00@float@user%a",
        &head(64),
        &payload(7),
    );
    let cut = put(
        tree,
        "org/model@2@0@5f00@float",
        &head(64),
        &payload(7)[1..],
    );
    let arguments = [
        "import",
        tree.to_str().unwrap(),
        store.path().to_str().unwrap(),
        "--at-a-time",
        "2",
        "--json",
    ];
    let output = kvrail(&arguments);
    let report = json(&output);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(report["imported"], 3);
    assert_eq!(report["imported_bytes"], 3 * PAYLOAD_BYTES);
    assert_eq!(report["other_models"], 3);
    assert_eq!(report["other_lengths"], 1);
    assert_eq!(
        (&report["layers"], &report["tagged"]),
        (&value!(1), &value!(1))
    );
    assert_eq!(report["damaged_count"], 1);
    assert_eq!(report["damaged"][0]["path"], cut.to_str().unwrap());

    std::fs::remove_file(&cut).unwrap();
    let text = kvrail(&arguments[..5]);
    let said = stdout(&text);
    assert!(
        said.contains("copied 0 chunks") && said.contains("3 there already"),
        "{said}"
    );
    assert_eq!(
        text.status.code(),
        Some(1),
        "its metadata is there, the file is not"
    );

    let verified = kvrail(&["verify", store.path().to_str().unwrap()]);
    assert_eq!(verified.status.code(), Some(0), "{}", stdout(&verified));
    check_loads(&open(store.path()));
}

/// What is loaded is what LMCache's files had, block by block.
fn check_loads(store: &Store) {
    for (number, hash) in [0x1f00_i64, -0x1f00, i64::MAX].into_iter().enumerate() {
        let region = Region::zeroed(PAYLOAD_BYTES).unwrap();
        let layers = (0..LAYERS)
            .map(|layer| LayerSpan {
                region: 0,
                offset: layer * BLOCK_BYTES,
                block_stride: LAYERS * BLOCK_BYTES,
                block_bytes: BLOCK_BYTES,
            })
            .collect();
        let layout = KvLayout::new(layers, BLOCKS, &[PAYLOAD_BYTES]).unwrap();
        let rank = u32::try_from(number % 2).unwrap();
        let kv_cache = store
            .attach(0, rank, layout, vec![region.clone()], BLOCKS)
            .unwrap();
        let load = LoadChunk {
            chunk: ChunkRef {
                key: ChunkKey::from_bytes(&hash.to_be_bytes()).unwrap(),
                parent: None,
            },
            first_block: 0,
            blocks: (0..BLOCKS).collect(),
        };
        let report = kv_cache.load(vec![load]).unwrap().wait(LIMIT).unwrap();
        assert_eq!(report.loaded, 1, "{report:?}");
        let mut blocks = vec![0; PAYLOAD_BYTES];
        region.copy_out(0, &mut blocks).unwrap();
        let mut tokens = vec![0; PAYLOAD_BYTES];
        order().to_tokens(&blocks, &mut tokens).unwrap();
        assert_eq!(tokens, payload(number));
    }
}

#[test]
fn a_store_without_lmcaches_hashes_is_refused_with_a_hint() {
    let source = tempfile::tempdir().unwrap();
    let store = common::store();
    let source = source.path().to_str().unwrap();
    let output = kvrail(&["import", source, common::path_of(&store)]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(
        said.contains("LMCache's hashes") && said.contains("chunk_hash: lmcache"),
        "{said}"
    );
    let output = kvrail(&["import", "/not/there", common::path_of(&store)]);
    assert!(stderr(&output).contains("not a directory"));
}
