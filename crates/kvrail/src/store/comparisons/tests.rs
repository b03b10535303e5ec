//! That an engine is replaced under loads and stores, and who waits for it.
#![cfg(not(feature = "shuttle"))]

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::{KvCache, LoadChunk, Namespace, OpenOptions, Store, StoreChunk};
use super::*;
use crate::chunk::{ChunkKey, ChunkRef, PAGE_BYTES};
use crate::config::{EngineChoice, MinFree, PageCache, StoreConfig};
use crate::io::{IoEngine, PosixEngine, UringEngine};
use crate::layout::{KvLayout, LayerSpan};
use crate::memory::Region;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_wait_ends_with_the_last_comparison_or_at_its_limit() {
    let comparisons = Arc::new(Comparisons::default());
    assert!(comparisons.wait(Duration::ZERO), "nothing is compared");
    comparisons.lock().under_way = 2;
    comparisons.end_one();
    assert!(!comparisons.wait(Duration::from_millis(20)));
    let other = Arc::clone(&comparisons);
    let ending = std::thread::spawn(move || other.end_one());
    assert!(comparisons.wait(Duration::MAX));
    ending.join().unwrap();
    assert!(!comparisons.is_stopped());
    comparisons.stop();
    assert!(comparisons.is_stopped());
}

/// A KV cache of its own for each of several threads that use one store.
struct Client {
    cache: KvCache,
    memory: Region,
}

impl Client {
    fn attach(store: &Store, rank: u32) -> Self {
        let memory = Region::zeroed(BLOCKS * BLOCK_BYTES).unwrap();
        let layer = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: BLOCK_BYTES,
            block_bytes: BLOCK_BYTES,
        };
        let layout = KvLayout::new(vec![layer], BLOCKS, &[memory.bytes()]).unwrap();
        let regions = vec![memory.clone()];
        let cache = store.attach(0, rank, layout, regions, 1).unwrap();
        Self { cache, memory }
    }

    /// Stores a chunk of bytes that nobody else stores, loads it elsewhere and compares.
    fn round_trip(&self, number: u64) {
        let chunk = ChunkRef {
            key: ChunkKey::from_bytes(blake3::hash(&number.to_le_bytes()).as_bytes()).unwrap(),
            parent: None,
        };
        let written: Vec<u8> = (0..BLOCK_BYTES as u64)
            .map(|index| (index.wrapping_mul(number | 1) >> 7) as u8)
            .collect();
        self.memory.copy_in(0, &written).unwrap();
        let storing = StoreChunk {
            chunk,
            blocks: vec![0],
        };
        let stored = self.cache.store(&[storing]).unwrap().wait(LONG).unwrap();
        assert_eq!(stored.stored, 1, "{stored:?}");
        let loading = LoadChunk {
            chunk,
            first_block: 0,
            blocks: vec![1],
        };
        let loaded = self.cache.load(vec![loading]).unwrap().wait(LONG).unwrap();
        assert_eq!(loaded.loaded, 1, "{loaded:?}");
        let mut read = vec![0; BLOCK_BYTES];
        self.memory.copy_out(BLOCK_BYTES, &mut read).unwrap();
        assert!(read == written, "chunk {number}");
    }
}

/// Several requests for the page table and the payload.
const BLOCK_BYTES: usize = 200 * PAGE_BYTES;
const BLOCKS: usize = 2;
const CLIENTS: u32 = 3;

#[test]
fn bytes_stay_right_when_the_engine_is_replaced_under_loads_and_stores() {
    let uring = match UringEngine::new(2, Arc::new(|| ())) {
        Ok(engine) => Arc::new(engine),
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    for page_cache in [PageCache::Auto, PageCache::Bypass, PageCache::Keep] {
        let directory = tempfile::tempdir().unwrap();
        let mut config = StoreConfig::with_path(directory.path());
        config.buffer_mib = 16;
        config.io_engine = EngineChoice::Posix;
        config.min_free = MinFree::Bytes(0);
        config.page_cache = page_cache;
        let namespace = Namespace::new("model", serde_json::Map::new()).unwrap();
        let store = Store::open(&config, namespace, OpenOptions::default()).unwrap();
        let shared = Arc::clone(&store.running.shared);
        let mount = Arc::clone(&shared.mounts[0]);
        let posix: Arc<dyn IoEngine> = mount.engine.get();
        let other = Arc::new(PosixEngine::new(2, Arc::new(|| ())).unwrap());
        let engines = [uring.clone() as Arc<dyn IoEngine>, other, posix];
        let is_over = AtomicBool::new(false);
        let replaced = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|rank| {
                    let (client, is_over) = (Client::attach(&store, rank), &is_over);
                    scope.spawn(move || {
                        let mut number = u64::from(rank) << 32;
                        while !is_over.load(Ordering::Relaxed) {
                            client.round_trip(number);
                            number += 1;
                        }
                        number & u64::from(u32::MAX)
                    })
                })
                .collect();
            let mut replaced = 0_u32;
            let end = Instant::now() + Duration::from_millis(700);
            while Instant::now() < end {
                shared.comparisons.lock().under_way = 1;
                let engine = Arc::clone(&engines[replaced as usize % engines.len()]);
                settle(&shared, &mount, (engine, format!("turn {replaced}")));
                assert!(shared.comparisons.wait(Duration::ZERO));
                let (name, reason) = mount.engine.describe();
                assert_eq!(name, engines[replaced as usize % engines.len()].name());
                assert_eq!(reason, format!("turn {replaced}"));
                replaced += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            is_over.store(true, Ordering::Relaxed);
            let moved: u64 = clients.into_iter().map(|one| one.join().unwrap()).sum();
            println!("{page_cache:?}: {moved} chunks, engine replaced {replaced} times");
            assert!(moved > 2 * u64::from(CLIENTS), "hardly anything was moved");
            replaced
        });
        assert!(replaced > 10, "replaced {replaced} times only");
        assert_eq!(store.metrics().loads_failed, 0);
        assert_eq!(store.metrics().uring_requests_held, 0);
    }
}
