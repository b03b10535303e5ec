//! Chunks that are copied together: read and put into order by a thread each, then stored.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::thread;

use kvrail::store::inspect::LmcacheFile;
use kvrail::{KvCache, KvLayout, LayerSpan, Region, StoreChunk};

use super::Report;
use super::target::{LIMIT, Target, TargetChunk};
use crate::failure::Failure;
use crate::output::warn;

/// Files to copy, and a KV cache with room for their blocks.
pub(super) struct Batch<'a> {
    target: &'a Target,
    at_a_time: usize,
    region: Region,
    /// The same memory, attached as each rank's.
    ranks: BTreeMap<u32, KvCache>,
    files: Vec<(LmcacheFile, TargetChunk)>,
}

impl<'a> Batch<'a> {
    /// Makes room for `at_a_time` chunks.
    pub(super) fn new(target: &'a Target, at_a_time: NonZeroUsize) -> Result<Self, Failure> {
        let at_a_time = at_a_time.get();
        let region = Region::zeroed(at_a_time * target.head.payload_bytes())?;
        Ok(Self {
            target,
            at_a_time,
            region,
            ranks: BTreeMap::new(),
            files: Vec::with_capacity(at_a_time),
        })
    }

    /// Adds a file.
    pub(super) fn add(&mut self, file: LmcacheFile, chunk: TargetChunk) {
        self.files.push((file, chunk));
    }

    /// Returns whether there is no room for another.
    pub(super) fn is_full(&self) -> bool {
        self.files.len() >= self.at_a_time
    }

    /// Copies what was added, and notes how that went.
    pub(super) fn write(&mut self, report: &mut Report) -> Result<(), Failure> {
        let files = std::mem::take(&mut self.files);
        let results = Mutex::new(Vec::with_capacity(files.len()));
        thread::scope(|scope| {
            for (place, (file, _)) in files.iter().enumerate() {
                let (batch, results) = (&*self, &results);
                let work = move || {
                    let result = batch.read(file, place);
                    let mut results = results
                        .lock()
                        .unwrap_or_else(|poisoned| poisoned.into_inner());
                    results.push((place, result));
                };
                thread::Builder::new()
                    .name("kvrail-import".into())
                    .spawn_scoped(scope, work)
                    .map_err(|error| Failure::new(format!("start a thread: {error}")))?;
            }
            Ok::<(), Failure>(())
        })?;
        let results = results
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        for (place, result) in results {
            let Some((file, chunk)) = files.get(place) else {
                continue;
            };
            match result {
                Ok(()) => self.store(*chunk, place, report)?,
                Err(error) => report.add_damage(&file.path, error),
            }
        }
        Ok(())
    }

    /// Reads a file into the blocks of its place.
    fn read(&self, file: &LmcacheFile, place: usize) -> kvrail::Result<()> {
        let target = self.target;
        let mut tokens = Vec::new();
        file.read_payload(&target.head, &mut tokens)?;
        let mut blocks = vec![0; tokens.len()];
        target.order.to_blocks(&tokens, 0, &mut blocks)?;
        self.region.copy_in(place * tokens.len(), &blocks)
    }

    /// Stores the chunk of a place by the way of all stores, and waits for it.
    fn store(
        &mut self,
        chunk: TargetChunk,
        place: usize,
        report: &mut Report,
    ) -> Result<(), Failure> {
        let count = self.target.blocks_per_chunk;
        let kv_cache = match self.ranks.entry(chunk.rank) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(attach(
                self.target,
                &self.region,
                self.at_a_time,
                chunk.rank,
            )?),
        };
        let chunks = [StoreChunk {
            chunk: chunk.chunk,
            blocks: (place * count..(place + 1) * count).collect(),
        }];
        let stored = kv_cache.store(&chunks)?.wait(LIMIT)?;
        report.imported += stored.stored as u64;
        report.imported_bytes += (stored.stored * self.target.head.payload_bytes()) as u64;
        report.already_present += stored.already_present as u64;
        report.no_room += stored.dropped as u64;
        report.not_written += stored.failed as u64;
        for notice in self.target.store.take_notices() {
            warn(&notice.message);
        }
        Ok(())
    }
}

/// Attaches the memory as the KV cache of a rank: block by block, as a chunk's payload is.
fn attach(
    target: &Target,
    region: &Region,
    at_a_time: usize,
    rank: u32,
) -> Result<KvCache, Failure> {
    let bytes = target.order.block_bytes();
    let layers = target.order.shape().layers;
    let spans = (0..layers)
        .map(|layer| LayerSpan {
            region: 0,
            offset: layer * bytes,
            block_stride: layers * bytes,
            block_bytes: bytes,
        })
        .collect();
    let blocks = at_a_time * target.blocks_per_chunk;
    let layout = KvLayout::new(spans, blocks, &[region.bytes()])?;
    let regions = vec![region.clone()];
    let attached = target
        .store
        .attach(0, rank, layout, regions, target.blocks_per_chunk)?;
    Ok(attached)
}
