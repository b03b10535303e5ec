//! LMCache's directory: files of its form, its names, and what is checked where there is no checksum.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::{Path, PathBuf};

use common::{LIMIT, config, namespace};
use kvrail::config::{DirectoryLayout, PathSharding, StoreConfig};
use kvrail::layout::{SideOrder, TokenOrder, TokenShape};
use kvrail::lmcache::{Element, MemoryFormat, TensorHead};
use kvrail::store::LmcacheNames;
use kvrail::{
    ChunkKey, ChunkRef, ErrorKind, KvCache, KvLayout, LayerSpan, LoadChunk, OpenOptions, Region,
    Store, StoreChunk,
};

/// Blocks of 32 tokens, 2 heads of 16 elements of 4 bytes: 8 KiB with K and V.
const SHAPE: TokenShape = TokenShape {
    layers: 3,
    tokens: 32,
    heads: 2,
    head_size: 16,
    element_bytes: 4,
};
const BLOCK_BYTES: usize = 2 * 32 * 2 * 16 * 4;
const BLOCKS: usize = 8;
const BLOCKS_PER_CHUNK: usize = 2;
const PAYLOAD_BYTES: usize = 3 * 2 * BLOCK_BYTES;

/// K by elements and V by tokens inside each head, as vLLM's CPU backend has them.
fn order() -> TokenOrder {
    let (head, run) = (2 * 32 * 16 * 4, 16 * 4);
    let keys = SideOrder {
        offset: 0,
        head_stride: head,
        token_stride: 4,
        element_stride: 32 * 4,
    };
    let values = SideOrder {
        offset: 32 * run,
        head_stride: head,
        token_stride: run,
        element_stride: 4,
    };
    TokenOrder::new(SHAPE, vec![keys, values]).unwrap()
}

fn settings(path: &Path) -> StoreConfig {
    StoreConfig {
        layout: DirectoryLayout::Lmcache,
        ..config(path)
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        lmcache: Some(LmcacheNames {
            model: "org/model".into(),
            workers: 1,
            element: Element::F32,
            has_sign: true,
        }),
        ..OpenOptions::default()
    }
}

fn open(path: &Path) -> Store {
    Store::open(&settings(path), namespace(), options()).unwrap()
}

/// A KV cache of random bytes, all of it in one region, layer outermost.
struct Cache {
    region: Region,
    kv_cache: KvCache,
}

impl Cache {
    fn attach(store: &Store, seed: usize) -> Self {
        let bytes = SHAPE.layers * BLOCKS * BLOCK_BYTES;
        let region = Region::zeroed(bytes).unwrap();
        if seed != 0 {
            let content: Vec<u8> = (0..bytes)
                .map(|at| (at * seed / 7 + at / 255) as u8)
                .collect();
            region.copy_in(0, &content).unwrap();
        }
        let layers = (0..SHAPE.layers)
            .map(|layer| LayerSpan {
                region: 0,
                offset: layer * BLOCKS * BLOCK_BYTES,
                block_stride: BLOCK_BYTES,
                block_bytes: BLOCK_BYTES,
            })
            .collect();
        let layout = KvLayout::new(layers, BLOCKS, &[bytes]).unwrap();
        let kv_cache = store
            .attach_by_tokens(
                0,
                0,
                layout,
                vec![region.clone()],
                BLOCKS_PER_CHUNK,
                order(),
            )
            .unwrap();
        Self { region, kv_cache }
    }

    /// The bytes of blocks, for each block all layers.
    fn blocks(&self, blocks: &[usize]) -> Vec<u8> {
        let mut all = Vec::new();
        for block in blocks {
            for layer in 0..SHAPE.layers {
                let mut bytes = vec![0; BLOCK_BYTES];
                let at = (layer * BLOCKS + block) * BLOCK_BYTES;
                self.region.copy_out(at, &mut bytes).unwrap();
                all.extend(bytes);
            }
        }
        all
    }

    fn store(&self, chunk: ChunkRef, blocks: &[usize]) -> kvrail::StoreReport {
        let blocks = blocks.to_vec();
        let ticket = self.kv_cache.store(&[StoreChunk { chunk, blocks }]);
        ticket.unwrap().wait(LIMIT).unwrap()
    }

    /// Loads the chunk's blocks from `first_block` on; why not, if it failed.
    fn load(&self, chunk: ChunkRef, first_block: usize, blocks: &[usize]) -> Option<String> {
        let load = LoadChunk {
            chunk,
            first_block,
            blocks: blocks.to_vec(),
        };
        let report = self.kv_cache.load(vec![load]).unwrap().wait(LIMIT).unwrap();
        report.errors.first().cloned()
    }
}

fn chunk(number: i64) -> ChunkRef {
    ChunkRef {
        key: ChunkKey::from_bytes(&number.to_be_bytes()).unwrap(),
        parent: None,
    }
}

fn file(path: &Path) -> PathBuf {
    path.join("12/34/org%2Fmodel%401%400%401e240%40float.kvcache.safetensors")
}

fn metadata(path: &Path) -> PathBuf {
    let mut name = file(path).into_os_string();
    name.push(".metadata");
    name.into()
}

fn found(store: &Store) -> usize {
    let keys = vec![chunk(123_456).key];
    store.lookup(0, &[0], keys).wait(LIMIT).unwrap()
}

/// Stores chunk 123456 in a directory of its own.
fn stored() -> (tempfile::TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let cache = Cache::attach(&store, 31);
    assert_eq!(cache.store(chunk(123_456), &[5, 2]).stored, 1);
    let blocks = cache.blocks(&[5, 2]);
    store.close(LIMIT).unwrap();
    (directory, blocks)
}

#[test]
fn a_file_is_head_and_tokens_and_its_metadata_the_head() {
    let (directory, blocks) = stored();
    let content = std::fs::read(file(directory.path())).unwrap();
    let head = TensorHead::new(Element::F32, &[2, 3, 64, 32], MemoryFormat::Kv2ltd).unwrap();
    assert_eq!(content[..4096], head.encode());
    assert_eq!(content.len(), 4096 + PAYLOAD_BYTES);
    let mut tokens = vec![0; PAYLOAD_BYTES];
    order().to_tokens(&blocks, &mut tokens).unwrap();
    assert_eq!(content[4096..], tokens);
    assert_eq!(
        std::fs::read(metadata(directory.path())).unwrap(),
        head.encode()
    );
    let mut names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["12", "tmp"], "no manifest, no accounts");
    assert_eq!(
        std::fs::read_dir(directory.path().join("tmp"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn what_was_stored_is_loaded_whole_and_in_part_and_again_from_memory() {
    let (directory, blocks) = stored();
    let with_tier = StoreConfig {
        local_cpu: true,
        max_local_cpu_size_gb: 0.001,
        ..settings(directory.path())
    };
    for config in [settings(directory.path()), with_tier] {
        let store = Store::open(&config, namespace(), options()).unwrap();
        assert_eq!(found(&store), 1);
        let target = Cache::attach(&store, 0);
        assert_eq!(target.load(chunk(123_456), 0, &[6, 1]), None);
        assert_eq!(target.blocks(&[6, 1]), blocks);
        assert_eq!(target.load(chunk(123_456), 1, &[7]), None);
        assert_eq!(target.blocks(&[7]), blocks[blocks.len() / 2..]);
        assert_eq!(target.store(chunk(123_456), &[0, 1]).already_present, 1);
        let from_memory = store.metrics().local_cpu_chunks_loaded;
        assert_eq!(from_memory > 0, config.local_cpu);
        let others: Vec<u8> = target.blocks(&[0, 2, 3, 4, 5]);
        assert!(others.iter().all(|byte| *byte == 0), "no other block");
    }
}

/// Damages the file, then loads it with a store that finds it. Returns what the load said.
fn load_after(damage: impl FnOnce(&Path)) -> String {
    let (directory, blocks) = stored();
    let path = file(directory.path());
    damage(&path);
    let store = open(directory.path());
    assert_eq!(found(&store), 1, "its metadata is there");
    let target = Cache::attach(&store, 0);
    let error = target.load(chunk(123_456), 0, &[6, 1]).unwrap();
    assert!(target.blocks(&[6, 1]).iter().all(|byte| *byte == 0));
    if path.exists() {
        // Not ours to move: remembered, and replaced by the next store.
        assert_eq!(found(&store), 0);
        assert!(!directory.path().join("quarantine").exists());
    }
    let source = Cache::attach(&store, 31);
    assert_eq!(source.store(chunk(123_456), &[5, 2]).stored, 1, "{error}");
    assert_eq!(target.load(chunk(123_456), 0, &[6, 1]), None);
    assert_eq!(target.blocks(&[6, 1]), blocks);
    error
}

#[test]
fn another_length_or_head_is_a_miss_and_replaced() {
    let cut = |path: &Path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len(4096 + PAYLOAD_BYTES as u64 - 1).unwrap();
    };
    assert!(load_after(cut).contains("expected 53248 bytes"));
    let turn = |path: &Path| {
        let mut content = std::fs::read(path).unwrap();
        let other = TensorHead::new(Element::F32, &[2, 3, 32, 64], MemoryFormat::Kv2ltd).unwrap();
        content[..4096].copy_from_slice(&other.encode());
        std::fs::write(path, content).unwrap();
    };
    assert!(load_after(turn).contains("head: shape is [2, 3, 32, 64], expected [2, 3, 64, 32]"));
    let blank = |path: &Path| {
        let mut content = std::fs::read(path).unwrap();
        content[..4096].fill(0);
        std::fs::write(path, content).unwrap();
    };
    assert!(load_after(blank).contains("head"));
}

#[test]
fn without_its_metadata_a_chunk_is_not_there() {
    let (directory, _) = stored();
    std::fs::remove_file(metadata(directory.path())).unwrap();
    let store = open(directory.path());
    assert_eq!(found(&store), 0);
    let cache = Cache::attach(&store, 31);
    assert_eq!(cache.store(chunk(123_456), &[5, 2]).stored, 1);
    assert!(metadata(directory.path()).exists());
    assert_eq!(found(&store), 1);
}

#[test]
fn what_lmcache_has_no_place_for_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let open = |config: &StoreConfig, options| Store::open(config, namespace(), options);
    let limited = StoreConfig {
        max_size: Some(1 << 30),
        ..settings(path)
    };
    let error = open(&limited, options()).unwrap_err();
    assert!(
        error.to_string().contains("`max_size` = 1073741824"),
        "{error}"
    );
    let mut several = settings(path);
    several.gds_path.push(path.join("b"));
    let error = open(&several, options()).unwrap_err();
    assert!(error.to_string().contains("by_gpu"), "{error}");
    several.gds_path_sharding = PathSharding::ByGpu;
    assert!(open(&several, options()).is_ok());
    for (config, options) in [
        (settings(path), OpenOptions::default()),
        (config(path), options()),
    ] {
        let error = open(&config, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let store = open(&settings(path), options()).unwrap();
    let region = Region::zeroed(BLOCK_BYTES * 4).unwrap();
    let span = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    let layout = KvLayout::new(vec![span], 4, &[region.bytes()]).unwrap();
    let attach =
        |order| store.attach_by_tokens(0, 0, layout.clone(), vec![region.clone()], 2, order);
    let error = attach(order()).unwrap_err();
    assert!(
        error.to_string().contains("not that of the layout"),
        "{error}"
    );
    let plain = store.attach(0, 0, layout.clone(), vec![region.clone()], 2);
    assert_eq!(plain.unwrap_err().kind(), ErrorKind::InvalidArgument);
}
