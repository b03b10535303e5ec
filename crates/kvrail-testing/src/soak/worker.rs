//! One process of the model checker: does what standard input says, and says how it went.
//!
//! Commands: `store INDEX`, `load INDEX`, `lookup FIRST COUNT`, `verify SEED`, `gc PERCENT SECONDS`,
//! `exit`. Answers: `stored`, `present`, `full`, `failed`, `loaded`, `missed`, `damaged`, `wrong`,
//! `found COUNT`, `verified COUNT SET_ASIDE,...`, `collected COUNT`, then the milliseconds it took.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvrail::config::{MinFree, StoreConfig};
use kvrail::store::capacity::{CollectOptions, collect};
use kvrail::store::inspect::{Handled, chunks, namespaces, set_aside, verify_chunk};
use kvrail::{
    ChunkKey, ChunkRef, ErrorKind, KvCache, KvLayout, LayerSpan, LoadChunk, Namespace, OpenOptions,
    Region, Store, StoreChunk,
};

use super::shared_memory;
use super::{
    CHUNKS, LOOKUP_LIMIT_SECONDS, MAX_SIZE, SLOW_LIMIT_SECONDS, TTL_SECONDS, WAIT_LIMIT_SECONDS,
};
use crate::random::Random;

/// Far beyond every limit: an answer that takes longer is a failure of the run.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const BLOCK_BYTES: usize = 5000;
const BLOCKS_PER_CHUNK: usize = 2;
const BLOCKS: usize = 4;
/// Share of all chunks that a verification looks at.
const SAMPLE: f64 = 0.1;
/// Pause after a store that found no room.
const FULL_PAUSE: Duration = Duration::from_millis(10);
/// How long an orderly end may wait for what is under way.
/// Chunks in memory: a few dozen of those that there are.
const TIER_GB: f64 = 1e-3;
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A store with a KV cache of a few blocks.
#[derive(Debug)]
pub struct Worker {
    path: PathBuf,
    store: Store,
    region: Region,
    kv_cache: KvCache,
}

/// Returns the settings of the stores under test, without a limit of their size.
pub fn unlimited(path: &Path) -> StoreConfig {
    let mut config = StoreConfig::with_path(path);
    config.buffer_mib = 1;
    config.min_free = MinFree::Bytes(0);
    config.wait_limit_seconds = WAIT_LIMIT_SECONDS;
    config.lookup_limit_seconds = LOOKUP_LIMIT_SECONDS;
    // The model knows what is there, not what was.
    config.lookup_hold_seconds = 0.0;
    config.slow_limit_seconds = SLOW_LIMIT_SECONDS;
    config
}

/// Returns the settings of the stores under test.
pub fn config(path: &Path) -> StoreConfig {
    StoreConfig {
        max_size: Some(MAX_SIZE),
        ttl_seconds: Some(TTL_SECONDS),
        ..unlimited(path)
    }
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
    pub fn open(path: &Path, config: &StoreConfig) -> kvrail::Result<Self> {
        let store = Store::open(config, namespace(), OpenOptions::default())?;
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
            path: path.to_path_buf(),
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
        let full = self.store.metrics().stores_dropped_no_space;
        let report = self.kv_cache.store(&[chunk]).unwrap();
        let report = report.wait(ANSWER_LIMIT).unwrap();
        let is_full = self.store.metrics().stores_dropped_no_space > full;
        match (report.stored, report.already_present) {
            (1, _) => "stored",
            (_, 1) => "present",
            _ if is_full => "full",
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
        let before_load = self.store.metrics();
        let report = self.kv_cache.load(vec![chunk]).unwrap();
        let report = report.wait(ANSWER_LIMIT).unwrap();
        if report.loaded == 1 {
            let mut found = before;
            self.region.copy_out(2 * BLOCK_BYTES, &mut found).unwrap();
            if found != content(index) {
                return "wrong";
            }
            // Memory may hold what is gone from the disk.
            let kept = self.store.metrics().local_cpu_chunks_loaded;
            return if kept > before_load.local_cpu_chunks_loaded {
                "remembered"
            } else {
                "loaded"
            };
        }
        if self.store.metrics().chunks_damaged > before_load.chunks_damaged {
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

    /// Verifies a sample of the chunks as `kvrail verify --repair` does. Returns the number of
    /// those looked at, and which ones were set aside.
    fn verify(&self, seed: u64) -> kvrail::Result<String> {
        let directory = self.path.join(namespace().directory_name());
        let found = namespaces(&self.path)?
            .into_iter()
            .find(|found| found.directory == directory);
        let Some(Ok(manifest)) = found.map(|found| found.manifest) else {
            return Ok("unverified".into());
        };
        let indices: HashMap<ChunkKey, u64> =
            (0..CHUNKS).map(|index| (key(index), index)).collect();
        let mut random = Random::new(seed);
        let (mut checked, mut aside) = (0, Vec::new());
        for chunk in chunks(&directory).flatten() {
            if !random.chance(SAMPLE) {
                continue;
            }
            checked += 1;
            let Err(error) = verify_chunk(&chunk, &manifest) else {
                continue;
            };
            let is_damaged = error.kind() == ErrorKind::Damaged;
            // What fails here may have been done all the same.
            if is_damaged && !matches!(set_aside(&chunk, "soak"), Ok(Handled::NotThere)) {
                aside.push(indices[&chunk.key].to_string());
            }
        }
        Ok(format!("verified {checked} {}", aside.join(",")))
    }

    /// Evicts down to a share of the limit, and what is older, as `kvrail gc` does.
    fn collect(&self, percent: u64, seconds: u64) -> kvrail::Result<String> {
        let options = CollectOptions {
            to_bytes: Some(MAX_SIZE * percent / 100),
            older_than: Some(Duration::from_secs(seconds)),
            ..CollectOptions::default()
        };
        let done = collect(&self.path, &options)?;
        let removed = done.removed_for_age.chunks + done.removed_for_size.chunks;
        Ok(format!("collected {removed}"))
    }
}

/// Serves commands until standard input ends.
///
/// # Errors
/// What opening the store says.
pub fn serve(path: &Path) -> kvrail::Result<()> {
    let mut config = config(path);
    // A third of the processes keep some chunks in memory of their own, and a third in memory that
    // they share.
    let kind = std::process::id() % 3;
    config.local_cpu = kind > 0;
    config.local_cpu_shared = (kind == 2).then(|| shared_memory::find(path)).flatten();
    config.max_local_cpu_size_gb = TIER_GB;
    let worker = Worker::open(path, &config)?;
    println!("open");
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let start = Instant::now();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let tool = |done: kvrail::Result<String>| done.unwrap_or_else(|_| "failed".into());
        let answer = match words[0] {
            "store" => {
                let answer = worker.store(number(1));
                if answer == "full" {
                    // Who asks again at once keeps the janitor from making room.
                    std::thread::sleep(FULL_PAUSE);
                }
                answer.to_owned()
            }
            "load" => worker.load(number(1)).to_owned(),
            "lookup" => format!("found {}", worker.lookup(number(1), number(2))),
            "verify" => tool(worker.verify(number(1))),
            "gc" => tool(worker.collect(number(1), number(2))),
            _ => break,
        };
        println!("{answer} {}", start.elapsed().as_millis());
        drop(std::io::stdout().flush());
    }
    // What is under way on a mount that hangs is given up.
    drop(worker.store.close(CLOSE_LIMIT));
    Ok(())
}
