//! One process of the model checker: does what standard input says, and says how it went.
//!
//! Commands: `store INDEX`, `load INDEX`, `lookup FIRST COUNT`. Answers: `stored`, `present`,
//! `failed`, `loaded`, `missed`, `damaged`, `wrong`, `found COUNT`, then the milliseconds it took.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use kvrail::config::{MinFree, StoreConfig};
use kvrail::{
    ChunkKey, ChunkRef, KvCache, KvLayout, LayerSpan, LoadChunk, Namespace, OpenOptions, Region,
    Store, StoreChunk,
};

use super::{LOOKUP_LIMIT_SECONDS, SLOW_LIMIT_SECONDS, WAIT_LIMIT_SECONDS};
use crate::random::Random;

/// Far beyond every limit: an answer that takes longer is a failure of the run.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const BLOCK_BYTES: usize = 5000;
const BLOCKS_PER_CHUNK: usize = 2;
const BLOCKS: usize = 4;

/// A store with a KV cache of a few blocks.
#[derive(Debug)]
pub struct Worker {
    store: Store,
    region: Region,
    kv_cache: KvCache,
}

/// Returns the settings of the stores under test.
pub fn config(path: &Path) -> StoreConfig {
    let mut config = StoreConfig::with_path(path);
    config.buffer_mib = 1;
    config.min_free = MinFree::Bytes(0);
    config.wait_limit_seconds = WAIT_LIMIT_SECONDS;
    config.lookup_limit_seconds = LOOKUP_LIMIT_SECONDS;
    config.slow_limit_seconds = SLOW_LIMIT_SECONDS;
    config
}

/// Returns the namespace of the stores under test.
pub fn namespace() -> Namespace {
    Namespace::new("soak", serde_json::Map::new()).unwrap()
}

/// Returns the key of a chunk.
pub fn key(index: u64) -> ChunkKey {
    let mut bytes = [0; 32];
    let mut random = Random::new(index);
    for part in bytes.chunks_exact_mut(8) {
        part.copy_from_slice(&random.number().to_le_bytes());
    }
    ChunkKey::from_bytes(&bytes).unwrap()
}

/// Returns what a chunk holds, always.
fn content(index: u64) -> Vec<u8> {
    let mut random = Random::new(!index);
    (0..BLOCK_BYTES * BLOCKS_PER_CHUNK)
        .map(|_| random.number() as u8)
        .collect()
}

impl Worker {
    /// Opens the store.
    ///
    /// # Errors
    /// What opening says; on a mount that fails it may.
    pub fn open(path: &Path) -> kvrail::Result<Self> {
        let store = Store::open(&config(path), namespace(), OpenOptions::default())?;
        let region = Region::zeroed(BLOCK_BYTES * BLOCKS)?;
        let layer = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: BLOCK_BYTES,
            block_bytes: BLOCK_BYTES,
        };
        let layout = KvLayout::new(vec![layer], BLOCKS, &[region.bytes()])?;
        let kv_cache = store.attach(0, 0, layout, vec![region.clone()], BLOCKS_PER_CHUNK)?;
        Ok(Self {
            store,
            region,
            kv_cache,
        })
    }

    fn chunk(index: u64) -> ChunkRef {
        ChunkRef {
            key: key(index),
            parent: None,
        }
    }

    /// Stores a chunk and says how that went.
    pub fn store(&self, index: u64) -> &'static str {
        self.region.copy_in(0, &content(index)).unwrap();
        let chunk = StoreChunk {
            chunk: Self::chunk(index),
            blocks: vec![0, 1],
        };
        let report = self.kv_cache.store(&[chunk]).unwrap();
        let report = report.wait(ANSWER_LIMIT).unwrap();
        match (report.stored, report.already_present) {
            (1, _) => "stored",
            (_, 1) => "present",
            _ => "failed",
        }
    }

    /// Loads a chunk, compares it and says how that went.
    pub fn load(&self, index: u64) -> &'static str {
        let before = vec![0xee; BLOCK_BYTES * BLOCKS_PER_CHUNK];
        self.region.copy_in(2 * BLOCK_BYTES, &before).unwrap();
        let chunk = LoadChunk {
            chunk: Self::chunk(index),
            first_block: 0,
            blocks: vec![2, 3],
        };
        let damaged = self.store.metrics().chunks_damaged;
        let report = self.kv_cache.load(vec![chunk]).unwrap();
        let report = report.wait(ANSWER_LIMIT).unwrap();
        if report.loaded == 1 {
            let mut found = before;
            self.region.copy_out(2 * BLOCK_BYTES, &mut found).unwrap();
            return if found == content(index) {
                "loaded"
            } else {
                "wrong"
            };
        }
        if self.store.metrics().chunks_damaged > damaged {
            "damaged"
        } else {
            "missed"
        }
    }

    /// Returns how many chunks from `first` on are there.
    pub fn lookup(&self, first: u64, count: u64) -> usize {
        let keys = (first..first + count).map(key).collect();
        self.store.lookup(0, &[0], keys).wait(ANSWER_LIMIT).unwrap()
    }
}

/// Serves commands until standard input ends.
pub fn serve(path: &Path) -> kvrail::Result<()> {
    let worker = Worker::open(path)?;
    println!("open");
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let start = Instant::now();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let answer = match words[0] {
            "store" => worker.store(number(1)).to_owned(),
            "load" => worker.load(number(1)).to_owned(),
            _ => format!("found {}", worker.lookup(number(1), number(2))),
        };
        println!("{answer} {}", start.elapsed().as_millis());
        drop(std::io::stdout().flush());
    }
    Ok(())
}
