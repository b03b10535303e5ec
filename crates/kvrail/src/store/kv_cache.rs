//! The KV cache of one group on one rank, attached to a store.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::batch::{Ending, start_load, start_store};
use super::cache_shared::{Attachment, CacheShared, left_to_loads};
use super::capacity::plan_use;
use super::gpu::Route;
use super::load_job::LoadJob;
use super::mount::Pause;
use super::notice::Topic;
use super::save::StoreJob;
use super::shared::Running;
use super::staged::{Staged, StagedImage};
use super::ticket::{LoadTicket, StoreTicket};
use crate::chunk::{ChunkKey, ChunkRef};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::{ComputeStream, StagingRange, gather};
use crate::sync::thread;

/// How long a store that may wait for a buffer waits until it looks again.
const BUFFER_STEP: Duration = Duration::from_millis(5);

/// A chunk to store, and the blocks that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreChunk {
    /// The chunk.
    pub chunk: ChunkRef,
    /// Its blocks in order, as many as a chunk has.
    pub blocks: Vec<usize>,
}

/// A chunk to load, and the blocks that it goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadChunk {
    /// The chunk.
    pub chunk: ChunkRef,
    /// The first block of the chunk that is wanted; earlier ones are not read or written.
    pub first_block: usize,
    /// Where the blocks from `first_block` to the chunk's last go.
    pub blocks: Vec<usize>,
}

/// The KV cache of one group on one rank, attached to a store. Clones share it.
#[derive(Debug, Clone)]
pub struct KvCache {
    running: Arc<Running>,
    shared: Arc<CacheShared>,
}

impl KvCache {
    pub(super) fn new(running: Arc<Running>, attachment: Attachment) -> Result<Self> {
        let shared = CacheShared::new(&running.shared, attachment)?;
        Ok(Self {
            running,
            shared: Arc::new(shared),
        })
    }

    /// Returns the bytes of one chunk file.
    pub fn chunk_file_bytes(&self) -> usize {
        self.shared.file_bytes()
    }

    /// Returns the bytes of one chunk's payload.
    pub fn payload_bytes(&self) -> usize {
        self.shared.format.payload_bytes()
    }

    /// Returns the number of staging buffers, each as large as one chunk file. Those that the DRAM
    /// tier may keep do not count.
    pub fn staging_buffers(&self) -> usize {
        self.shared.staging
    }

    /// Returns the way that chunks go now, for each path in the order of the configuration.
    ///
    /// It changes while a store runs: what cuFile fails at too often goes on by POSIX.
    pub fn routes(&self) -> Vec<Route> {
        let gpu = self.shared.gpu.as_ref();
        let mounts = self.running.shared.mounts.iter();
        mounts
            .map(|mount| gpu.map_or(Route::Posix, |gpu| gpu.route(mount)))
            .collect()
    }

    /// Stores chunks: gathers them into staging buffers before it returns, writes them later.
    ///
    /// The blocks may be reused as soon as it returns. Never waits: a chunk for which no buffer
    /// is free is dropped and counted.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a wrong number of blocks or a block outside the KV
    /// cache: nothing is stored then.
    pub fn store(&self, chunks: &[StoreChunk]) -> Result<StoreTicket> {
        self.store_after(chunks, ComputeStream::default())
    }

    /// Stores chunks that are complete when all that is on `stream` now is done.
    ///
    /// For KV cache in the memory of a GPU: the copy is put on that stream, so what is put there
    /// after this call may change the blocks. In host memory it is [`KvCache::store`].
    ///
    /// # Errors
    /// As [`KvCache::store`].
    pub fn store_after(&self, chunks: &[StoreChunk], stream: ComputeStream) -> Result<StoreTicket> {
        self.store_until(chunks, stream, None)
    }

    /// Stores chunks as [`KvCache::store`] does, but waits for staging buffers until `deadline`: for
    /// callers whose blocks stay as they are meanwhile, and who have a thread for it.
    pub(super) fn store_patiently(
        &self,
        chunks: &[StoreChunk],
        deadline: Instant,
    ) -> Result<StoreTicket> {
        self.store_until(chunks, ComputeStream::default(), Some(deadline))
    }

    fn store_until(
        &self,
        chunks: &[StoreChunk],
        stream: ComputeStream,
        deadline: Option<Instant>,
    ) -> Result<StoreTicket> {
        for chunk in chunks {
            self.check_blocks(&chunk.blocks, self.shared.blocks_per_chunk)?;
        }
        let (ticket, members) = start_store(chunks.len());
        for (chunk, member) in chunks.iter().zip(members) {
            match self.stage(chunk, stream, deadline)? {
                Err(ending) => member.end(ending),
                Ok((image, used_at)) => {
                    let job = StoreJob {
                        cache: Arc::clone(&self.shared),
                        chunk: chunk.chunk,
                        image,
                        member,
                        submitted: Instant::now(),
                        watched: Arc::default(),
                        used_at,
                    };
                    if !self.running.queue.push_store(job) {
                        let store = &self.running.shared;
                        store.metrics.stores_failed.add(1);
                        store.present.remove(&self.shared.place(&chunk.chunk.key));
                    }
                }
            }
        }
        Ok(ticket)
    }

    /// Gathers one chunk, or says why not. Also returns when it was used, where its file is to be told.
    fn stage(
        &self,
        chunk: &StoreChunk,
        stream: ComputeStream,
        deadline: Option<Instant>,
    ) -> Result<Result<(Staged, Option<i64>), Ending>> {
        let store = &self.running.shared;
        let metrics = &store.metrics;
        let mount = store.mount(self.shared.part, &chunk.chunk.key);
        match mount.paused() {
            Some(Pause::NoSpace) => {
                metrics.stores_dropped_no_space.add(1);
                return Ok(Err(Ending::Dropped));
            }
            Some(Pause::Unwell) => {
                metrics.stores_dropped_path_unwell.add(1);
                return Ok(Err(Ending::Dropped));
            }
            None => {}
        }
        let place = self.shared.place(&chunk.chunk.key);
        if !store.capacity.admits(mount, &place.2) {
            metrics.stores_dropped_not_admitted.add(1);
            return Ok(Err(Ending::Dropped));
        }
        if !store.present.insert(place) {
            metrics.chunks_already_present.add(1);
            return Ok(Err(Ending::AlreadyPresent));
        }
        let used_at = plan_use(store, &self.shared, &chunk.chunk, true);
        let gpu = self.shared.gpu.as_ref();
        let route = gpu.map_or(Route::Posix, |gpu| gpu.route(mount));
        match self.stage_by(route, &chunk.blocks, stream, deadline) {
            Ok(Some(staged)) => Ok(Ok((staged, used_at))),
            Ok(None) => {
                store.present.remove(&place);
                metrics.stores_dropped_no_buffer.add(1);
                Ok(Err(Ending::Dropped))
            }
            // A GPU that refuses costs the chunk; what the caller did wrong is the caller's.
            Err(error) if error.kind() == ErrorKind::Gpu => {
                store.present.remove(&place);
                metrics.stores_failed.add(1);
                store
                    .notices
                    .warn(Topic::StoreFailed, || format!("store failed: {error}"));
                Ok(Err(Ending::Failed(error.to_string())))
            }
            Err(error) => {
                store.present.remove(&place);
                Err(error)
            }
        }
    }

    /// Stages the blocks of a chunk by a route; `None` when its memory is in use.
    fn stage_by(
        &self,
        route: Route,
        blocks: &[usize],
        stream: ComputeStream,
        deadline: Option<Instant>,
    ) -> Result<Option<Staged>> {
        let cache = &*self.shared;
        let metrics = &self.running.shared.metrics;
        let file_bytes = cache.format.file_bytes();
        let gpu = match (&cache.gpu, route) {
            (Some(gpu), Route::Slot | Route::InPlace) => gpu,
            (Some(gpu), Route::Posix) if gpu.stages_in_slots() => gpu,
            (gpu, _) => {
                let Some(mut image) = self.take_store_buffer(deadline) else {
                    return Ok(None);
                };
                let mut image = image.split_to(file_bytes);
                let staged = match gpu {
                    Some(gpu) => gpu.stage(cache, blocks, image, stream, metrics)?,
                    None => {
                        self.fill(blocks, &mut image)?;
                        Some(StagedImage::complete(image))
                    }
                };
                return Ok(staged.map(Staged::Host));
            }
        };
        let Some(reserve) = self.reserve(gpu.slots(route).slot_count()) else {
            return Ok(None);
        };
        if route != Route::InPlace {
            let staged = gpu.stage_slot(cache, blocks, reserve, stream)?;
            return Ok(staged.map(Staged::Slot));
        }
        let staged = gpu.stage_in_place(cache, blocks, reserve, stream)?;
        Ok(staged.map(Staged::InPlace))
    }

    /// Gathers the payload into its place in the image.
    fn fill(&self, blocks: &[usize], image: &mut StagingRange) -> Result<()> {
        let plan = TransferPlan::new(&self.shared.layout, blocks)?;
        let format = &self.shared.format;
        let start = format.payload_offset();
        let end = start + format.payload_bytes();
        let target = super::image::bytes_mut(image.as_mut_slice(), start..end)?;
        gather(&plan, &self.shared.regions, target)?;
        // The slot held other bytes before: what is padding now must be zero again.
        super::image::bytes_mut(image.as_mut_slice(), end..end + format.pad_bytes())?.fill(0);
        Ok(())
    }

    /// Takes a buffer for a store, unless the ones that are left are kept for loads; waits for one
    /// until `deadline`.
    fn take_store_buffer(&self, deadline: Option<Instant>) -> Option<StagingRange> {
        let pool = &self.shared.pool;
        loop {
            let reserve = self.reserve(self.shared.staging);
            let buffer = match (reserve, deadline) {
                (None, _) => None,
                (Some(reserve), None) => pool.try_take(reserve),
                // In steps: how many are left to loads changes without one coming free.
                (Some(reserve), Some(deadline)) => {
                    pool.take_beyond(reserve, deadline.min(Instant::now() + BUFFER_STEP))
                }
            };
            if buffer.is_some() || deadline.is_none_or(|deadline| Instant::now() >= deadline) {
                return buffer;
            }
            if reserve.is_none() {
                thread::sleep(BUFFER_STEP);
            }
        }
    }

    /// Returns how many of `count` buffers a store leaves to loads; `None` when it gets none.
    fn reserve(&self, count: usize) -> Option<usize> {
        match count {
            // The only buffer: loads go first.
            1 if self.running.queue.has_loads() => None,
            count => Some(left_to_loads(count)),
        }
    }

    /// Loads chunks: reads, verifies and copies them to their blocks in the background.
    ///
    /// The blocks belong to the load until the ticket is done. A chunk that is missing or bad is
    /// in the report; its blocks hold no valid KV then, and blocks not named are never touched.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a wrong number of blocks or a block outside the KV
    /// cache: nothing is loaded then.
    pub fn load(&self, chunks: Vec<LoadChunk>) -> Result<LoadTicket> {
        self.load_after(chunks, ComputeStream::default())
    }

    /// Loads chunks into blocks that are free once all that is on `stream` now is done.
    ///
    /// For KV cache in the memory of a GPU: the serving engine may give blocks out while work on
    /// its stream still uses them. In host memory it is [`KvCache::load`].
    ///
    /// # Errors
    /// As [`KvCache::load`], and [`ErrorKind::Gpu`] when the stream cannot be marked.
    pub fn load_after(&self, chunks: Vec<LoadChunk>, stream: ComputeStream) -> Result<LoadTicket> {
        let blocks_per_chunk = self.shared.blocks_per_chunk;
        for chunk in &chunks {
            self.check_blocks(
                &chunk.blocks,
                blocks_per_chunk.saturating_sub(chunk.first_block),
            )?;
        }
        let gpu = self.shared.gpu.as_ref();
        let after = gpu.map(|gpu| gpu.mark(stream)).transpose()?;
        let plan =
            |chunk: &LoadChunk| plan_use(&self.running.shared, &self.shared, &chunk.chunk, false);
        let used: Vec<Option<i64>> = chunks.iter().map(plan).collect();
        let (ticket, members) = start_load(chunks.len());
        let format = &self.shared.format;
        let submitted = Instant::now();
        let jobs = chunks
            .into_iter()
            .zip(used)
            .zip(members)
            .map(|((chunk, used_at), member)| LoadJob {
                cache: Arc::clone(&self.shared),
                chunk: chunk.chunk,
                route: self.route(&chunk.chunk.key),
                cufile_error: None,
                payload: chunk.first_block * format.block_bytes()..format.payload_bytes(),
                blocks: chunk.blocks,
                after: after.clone(),
                member,
                submitted,
                started: None,
                watched: Arc::default(),
                used_at,
                served_by: Mutex::default(),
            })
            .collect();
        let refused = self.running.queue.push_loads(jobs);
        self.running
            .shared
            .metrics
            .loads_failed
            .add(refused.len() as u64);
        for job in refused {
            job.member.end(Ending::Failed(
                "the queue of loads is full or closed, or no thread is left to work on it".into(),
            ));
        }
        Ok(ticket)
    }

    /// Returns the way of a chunk now.
    fn route(&self, key: &ChunkKey) -> Route {
        let mount = self.running.shared.mount(self.shared.part, key);
        let gpu = self.shared.gpu.as_ref();
        gpu.map_or(Route::Posix, |gpu| gpu.route(mount))
    }

    /// Checks the number of a chunk's blocks, and that they lie in the KV cache.
    fn check_blocks(&self, blocks: &[usize], expected: usize) -> Result<()> {
        let invalid = |message| Err(Error::new(ErrorKind::InvalidArgument, message));
        if blocks.len() != expected || expected == 0 {
            return invalid(format!(
                "{} blocks: expected {expected} (at least one)",
                blocks.len()
            ));
        }
        let count = self.shared.layout.block_count();
        match blocks.iter().find(|block| **block >= count) {
            Some(block) => invalid(format!("block {block}: the KV cache has {count} blocks")),
            None => Ok(()),
        }
    }
}
