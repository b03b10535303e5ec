//! What the store's tests share: a directory, a KV cache of random bytes, chunk keys.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

pub mod known;
pub mod small_file_system;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail::config::{EngineChoice, MinFree, PathWeights, StoreConfig};
use kvrail::io::IoEngine;
use kvrail::{
    ChunkKey, ChunkRef, KvCache, KvLayout, LayerSpan, LoadChunk, LoadReport, Namespace,
    OpenOptions, Region, Store, StoreChunk, StoreReport,
};
use kvrail_testing::FaultEngine;

/// Far beyond what any step takes, so that a hang fails the test.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Bytes of a chunk's file in the default geometry: head, three pages of payload, one of table.
pub const FILE_BYTES: u64 = 20_480;

/// The geometry of a small KV cache: layer outermost, blocks with a gap behind each.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    pub layers: usize,
    pub block_bytes: usize,
    pub blocks_per_chunk: usize,
    pub blocks: usize,
}

impl Default for Geometry {
    /// A payload of 12,000 bytes: three pages, the last one padded.
    fn default() -> Self {
        Self {
            layers: 2,
            block_bytes: 3000,
            blocks_per_chunk: 2,
            blocks: 64,
        }
    }
}

/// A KV cache with its memory.
pub struct Cache {
    pub geometry: Geometry,
    pub region: Region,
    pub kv_cache: KvCache,
}

pub fn config(path: &Path) -> StoreConfig {
    let mut config = StoreConfig::with_path(path);
    config.buffer_mib = 1;
    // A build machine may be fuller than a user's disk should be.
    config.min_free = MinFree::Bytes(0);
    // Not what measures best: a test shall do the same each time.
    config.io_engine = engine();
    config.path_weights = PathWeights::Equal;
    // Tests change what is there behind the store's back, and look what it says then.
    config.lookup_hold_seconds = 0.0;
    config
}

/// The engine under test. Binaries whose names begin with `uring` repeat the tests of others.
pub fn engine() -> EngineChoice {
    match module_path!().starts_with("uring") {
        true => EngineChoice::Uring,
        false => EngineChoice::Posix,
    }
}

/// The engine under test, failing as a script says.
pub fn fault_engine(seed: u64) -> Arc<FaultEngine> {
    match engine() {
        EngineChoice::Uring => FaultEngine::over_uring(seed),
        _ => FaultEngine::new(seed),
    }
}

/// The same with a limit to what is stored.
pub fn limited(path: &Path, max_size: u64) -> StoreConfig {
    StoreConfig {
        max_size: Some(max_size),
        ..config(path)
    }
}

pub fn namespace() -> Namespace {
    Namespace::new("test/model", serde_json::Map::new()).unwrap()
}

pub fn open(path: &Path) -> Store {
    open_as(&config(path))
}

/// Opens a store as a configuration says.
pub fn open_as(config: &StoreConfig) -> Store {
    Store::open(config, namespace(), OpenOptions::default()).unwrap()
}

pub fn open_with(config: &StoreConfig, engine: Arc<dyn IoEngine>) -> Store {
    Store::open_with_engine(config, namespace(), OpenOptions::default(), engine).unwrap()
}

impl Cache {
    pub fn attach(store: &Store, rank: u32, geometry: Geometry) -> Self {
        let stride = geometry.block_bytes + 8;
        let layer_bytes = stride * geometry.blocks;
        let region = Region::zeroed(layer_bytes * geometry.layers).unwrap();
        let layers = (0..geometry.layers)
            .map(|layer| LayerSpan {
                region: 0,
                offset: layer * layer_bytes,
                block_stride: stride,
                block_bytes: geometry.block_bytes,
            })
            .collect();
        let layout = KvLayout::new(layers, geometry.blocks, &[region.bytes()]).unwrap();
        let regions = vec![region.clone()];
        let kv_cache = store
            .attach(0, rank, layout, regions, geometry.blocks_per_chunk)
            .unwrap();
        Self {
            geometry,
            region,
            kv_cache,
        }
    }

    fn offset(&self, layer: usize, block: usize) -> usize {
        let stride = self.geometry.block_bytes + 8;
        layer * stride * self.geometry.blocks + block * stride
    }

    /// Fills a block of all layers with bytes that follow from `seed`.
    pub fn fill(&self, block: usize, seed: u64) {
        for layer in 0..self.geometry.layers {
            let bytes = noise(seed ^ (layer as u64) << 32, self.geometry.block_bytes);
            self.region
                .copy_in(self.offset(layer, block), &bytes)
                .unwrap();
        }
    }

    /// Returns a block's bytes, all layers behind each other.
    pub fn block(&self, block: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.geometry.layers * self.geometry.block_bytes];
        for (layer, part) in bytes
            .chunks_exact_mut(self.geometry.block_bytes)
            .enumerate()
        {
            self.region
                .copy_out(self.offset(layer, block), part)
                .unwrap();
        }
        bytes
    }

    /// Returns all of the memory, gaps too.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.region.bytes()];
        self.region.copy_out(0, &mut bytes).unwrap();
        bytes
    }

    pub fn store(&self, chunks: &[(u64, Vec<usize>)]) -> StoreReport {
        let chunks: Vec<StoreChunk> = chunks
            .iter()
            .map(|(index, blocks)| StoreChunk {
                chunk: chunk(*index),
                blocks: blocks.clone(),
            })
            .collect();
        self.kv_cache.store(&chunks).unwrap().wait(LIMIT).unwrap()
    }

    /// Stores a chunk that no other one goes before, from the first two blocks.
    pub fn store_alone(&self, index: u64) -> StoreReport {
        let chunk = StoreChunk {
            chunk: ChunkRef {
                parent: None,
                ..chunk(index)
            },
            blocks: vec![0, 1],
        };
        self.kv_cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap()
    }

    /// Loads chunks, each from its first block that is wanted.
    pub fn load(&self, chunks: &[(u64, usize, Vec<usize>)]) -> LoadReport {
        let chunks = chunks
            .iter()
            .map(|(index, first_block, blocks)| LoadChunk {
                chunk: chunk(*index),
                first_block: *first_block,
                blocks: blocks.clone(),
            })
            .collect();
        self.kv_cache.load(chunks).unwrap().wait(LIMIT).unwrap()
    }
}

pub fn key(index: u64) -> ChunkKey {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&index.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    bytes[24..].copy_from_slice(&index.to_le_bytes());
    ChunkKey::from_bytes(&bytes).unwrap()
}

/// The `index`-th chunk of the one prompt that the tests know.
pub fn chunk(index: u64) -> ChunkRef {
    ChunkRef {
        key: key(index),
        parent: index.checked_sub(1).map(key),
    }
}

/// Reproducible bytes without a pattern (xorshift64*).
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
        })
        .collect()
}

/// Returns the files below a directory, temp files and manifests left out.
pub fn chunk_files(path: &Path) -> Vec<PathBuf> {
    let namespace = path.join(namespace().directory_name());
    let mut files: Vec<PathBuf> = kvrail::store::inspect::chunks(&namespace)
        .map(|file| file.unwrap().path)
        .collect();
    files.sort();
    files
}

/// Returns the bytes of all chunk files, while others remove and add some.
pub fn chunk_bytes(path: &Path) -> u64 {
    if !path.join(namespace().directory_name()).is_dir() {
        return 0;
    }
    chunk_files(path)
        .iter()
        .filter_map(|file| std::fs::metadata(file).ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// Waits for a condition that other threads bring about. Returns how long that took.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    start.elapsed()
}

/// Returns the names in a folder of the namespace, none if it is not there.
pub fn names(path: &Path, folder: &str) -> Vec<String> {
    let folder = path.join(namespace().directory_name()).join(folder);
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

pub fn chunk_path(path: &Path, rank: u32, index: u64) -> PathBuf {
    let name = key(index).to_string();
    path.join(namespace().directory_name())
        .join(format!("g0r{rank}"))
        .join(&name[..3])
        .join(format!("{name}.safetensors"))
}
