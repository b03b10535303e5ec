//! A store that answers prompts: lookup, load, store, as the connector of a serving engine has it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use kvrail::config::{EngineChoice, StoreConfig};
use kvrail::io::MountReport;
use kvrail::{ChunkRef, KvCache, LoadChunk, Namespace, OpenOptions, Store, StoreChunk};

use super::Wish;
use crate::bench::clients::{self, Sample};
use crate::bench::kv_memory::KvMemory;
use crate::bench::plan::Plan;
use crate::bench::random::Random;
use crate::bench::subject;
use crate::bench::submission::{Submission, WAIT_LIMIT, key_of};
use crate::failure::Failure;
use crate::workload::Request;

/// Chunks of one prompt in KV memory at the same time, at most: what is longer goes through it in
/// parts.
const PART_CHUNKS_MAX: usize = 16;

/// A store, and the KV memory of its clients.
pub(super) struct Server {
    store: Store,
    cache: KvCache,
    memory: KvMemory,
    directories: Vec<PathBuf>,
    submission: Submission,
    clients: usize,
    /// Chunks that a client has room for.
    part: usize,
}

/// What became of some prompts.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers {
    pub(super) sample: Sample,
    pub(super) counts: Counts,
    /// Of each prompt: how long its lookup took.
    pub(super) lookups: Vec<Duration>,
    /// Of each prompt of which something was there: how long it took until that was in KV memory,
    /// the lookup included.
    pub(super) hits: Vec<Duration>,
}

/// Chunks of prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) asked: u64,
    pub(super) loaded: u64,
    /// Found by the lookup, but not loaded: evicted in between.
    pub(super) lost: u64,
    pub(super) stored: u64,
    /// Not stored, since somebody else just did.
    pub(super) already_present: u64,
}

/// What is said of a store in the end.
#[derive(Debug)]
pub(super) struct Closed {
    pub(super) mount: MountReport,
    /// The chunks on each path.
    pub(super) chunks: Vec<u64>,
    pub(super) retries: u64,
}

impl Server {
    /// Opens a store over `paths`, with KV memory for all clients.
    pub(super) fn open(
        plan: &Plan,
        wish: &Wish,
        engine: EngineChoice,
        paths: &[PathBuf],
    ) -> Result<Self, Failure> {
        let geometry = plan.geometry;
        let part = plan.memory_bytes / geometry.payload_bytes() / plan.in_flight;
        if part == 0 {
            let message = format!(
                "--memory-mib holds no chunk of {} for each of {} prompts in flight",
                geometry.name, plan.in_flight
            );
            return Err(Failure::new(message).with_hint("give more, or fewer --in-flight"));
        }
        let part = part.min(PART_CHUNKS_MAX);
        let memory = KvMemory::new(geometry, part * plan.in_flight)?;
        memory.fill(&mut Random::new(0x6b76_7261_696c))?;
        let config = StoreConfig {
            max_size: wish.max_size,
            ..subject::config(plan, engine, paths)
        };
        let namespace = Namespace::new(geometry.name, serde_json::Map::new())?;
        let name = namespace.directory_name();
        let store = Store::open(&config, namespace, OpenOptions::default())?;
        // What is measured is the engine that was found to be the better one.
        store.wait_for_engines(WAIT_LIMIT)?;
        let regions = vec![memory.region()];
        let blocks = geometry.blocks_per_chunk();
        Ok(Self {
            cache: store.attach(0, 0, memory.layout()?, regions, blocks)?,
            store,
            memory,
            directories: paths.iter().map(|path| path.join(&name)).collect(),
            submission: Submission::default(),
            clients: plan.in_flight,
            part,
        })
    }

    /// Returns the bytes of a chunk's file.
    pub(super) fn file_bytes(&self) -> usize {
        self.cache.chunk_file_bytes()
    }

    /// Answers prompts, one at a time on each client.
    pub(super) fn answer(
        &self,
        requests: &[Request],
        bar: &ProgressBar,
    ) -> Result<Answers, Failure> {
        let numbers: Vec<u64> = (0..requests.len() as u64).collect();
        let all = Mutex::new(Answers::default());
        let mut clients: Vec<Range<usize>> = (0..self.clients)
            .map(|client| client * self.part..(client + 1) * self.part)
            .collect();
        let sample = clients::run(&mut clients, &numbers, |slots, number| {
            let Some(request) = requests.get(number as usize) else {
                return Err(Failure::new(format!("there is no prompt {number}")));
            };
            self.answer_one(request, slots.clone(), &all)?;
            bar.inc(1);
            Ok(())
        })?;
        let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
        all.sample = sample;
        Ok(all)
    }

    fn answer_one(
        &self,
        request: &Request,
        slots: Range<usize>,
        all: &Mutex<Answers>,
    ) -> Result<(), Failure> {
        let chunks = chunk_refs(&request.chunks)?;
        let keys = chunks.iter().map(|chunk| chunk.key).collect();
        let begin = Instant::now();
        let found = self.store.lookup(0, &[0], keys).wait(WAIT_LIMIT)?;
        let lookup = begin.elapsed();
        let mut ready = lookup;
        let mut counts = Counts {
            asked: chunks.len() as u64,
            ..Counts::default()
        };
        let numbered: Vec<(u64, ChunkRef)> = request.chunks.iter().copied().zip(chunks).collect();
        let (there, _) = numbered.split_at(found.min(numbered.len()));
        for part in there.chunks(slots.len()) {
            let (loaded, time) = self.load(part, slots.start)?;
            counts.loaded += loaded as u64;
            ready += time;
            if loaded < part.len() {
                counts.lost += (there.len() - counts.loaded as usize) as u64;
                break;
            }
        }
        let (_, rest) = numbered.split_at(counts.loaded as usize);
        for (slot, (number, chunk)) in slots.cycle().zip(rest) {
            match self.store_one(slot, *number, *chunk)? {
                true => counts.stored += 1,
                false => counts.already_present += 1,
            }
        }
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        all.counts.add(counts);
        all.lookups.push(lookup);
        if counts.loaded > 0 {
            all.hits.push(ready);
        }
        Ok(())
    }

    /// Loads chunks to the slots from `first` on; returns how many from the first one came, each of
    /// them compared with what was stored, and what the load alone took.
    fn load(&self, part: &[(u64, ChunkRef)], first: usize) -> Result<(usize, Duration), Failure> {
        let mut wanted = Vec::with_capacity(part.len());
        for (slot, (_, chunk)) in (first..).zip(part) {
            self.memory.wipe(slot)?;
            wanted.push(LoadChunk {
                chunk: *chunk,
                first_block: 0,
                blocks: self.memory.blocks(slot),
            });
        }
        let begin = Instant::now();
        let report = self.cache.load(wanted)?.wait(WAIT_LIMIT)?;
        let time = begin.elapsed();
        let loaded = report.failed.first().copied().unwrap_or(part.len());
        for (slot, (number, _)) in (first..).zip(part).take(loaded) {
            if !self.memory.is_stamped(slot, *number)? {
                let message = format!("chunk {number:x} was loaded with other bytes than stored");
                return Err(Failure::new(message).damaged());
            }
        }
        Ok((loaded, time))
    }

    /// Stores a chunk from a slot; returns whether it was not there yet.
    fn store_one(&self, slot: usize, number: u64, chunk: ChunkRef) -> Result<bool, Failure> {
        self.memory.stamp(slot, number)?;
        let chunk = StoreChunk {
            chunk,
            blocks: self.memory.blocks(slot),
        };
        let submit = || Ok(self.cache.store(std::slice::from_ref(&chunk))?);
        let report = self.submission.submit(submit)?;
        match (report.stored, report.already_present) {
            (1, _) => Ok(true),
            (_, 1) => Ok(false),
            _ => Err(Submission::not_stored(&self.store, number)),
        }
    }

    /// Ends the store.
    pub(super) fn close(&self) -> Result<Closed, Failure> {
        let mount = self.store.describe().into_iter().next();
        self.store.close(WAIT_LIMIT)?;
        let mut chunks = Vec::new();
        for directory in &self.directories {
            let mut count = 0;
            for file in kvrail::store::inspect::chunks(directory) {
                file?;
                count += 1;
            }
            chunks.push(count);
        }
        Ok(Closed {
            mount: mount.ok_or_else(|| Failure::new("the store reports no mount"))?,
            chunks,
            retries: self.submission.retries(),
        })
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.loaded += other.loaded;
        self.lost += other.lost;
        self.stored += other.stored;
        self.already_present += other.already_present;
    }
}

/// Returns the keys of a prompt's chunks, each with the one before it as parent.
fn chunk_refs(numbers: &[u64]) -> Result<Vec<ChunkRef>, Failure> {
    let mut parent = None;
    let mut chunks = Vec::with_capacity(numbers.len());
    for number in numbers {
        let key = key_of(*number)?;
        chunks.push(ChunkRef { key, parent });
        parent = Some(key);
    }
    Ok(chunks)
}
