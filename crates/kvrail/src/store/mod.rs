//! The store: lookup, load and store of chunks in directories that many instances share.
//!
//! A chunk exists when its file has its final name: there is no index, no scan at start, and
//! nothing that instances would have to agree on beside the file system. A file gets that name by
//! a rename after every byte was written and counted, and is verified whenever it is read.
//!
//! - [`Store`] opens the directories, and runs the threads
//! - [`KvCache`] is the memory of one group on one rank, with `store` and `load`
//! - `save`, `load`, `lookup` are the three operations, each chunk on its own
//! - `queue` decides what goes first, `batch` and `ticket` tell the caller how it ended
//! - [`slab`] is the store of a serving cache's host memory, with objects in the place of blocks
//! - [`inspect`] reads a store without KV cache, for tools

mod active_engine;
mod assemble;
mod bad;
mod bandwidth_record;
mod batch;
mod breaker;
mod cache_shared;
pub mod capacity;
mod chunk_file;
mod comparisons;
mod crew;
mod directory;
mod durable;
mod engine;
mod file_system;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gpu;
mod health;
mod image;
pub mod inspect;
mod known;
mod kv_cache;
mod lingering;
mod lmcache_names;
mod load;
mod load_host;
mod load_job;
mod load_memory;
mod load_tokens;
mod lookup;
mod manifest;
mod metrics;
#[cfg(all(test, feature = "shuttle"))]
mod models;
mod mount;
mod namespace;
mod nearest;
mod notice;
mod open;
mod open_folders;
mod options;
mod parked;
mod placement;
mod present;
mod publish;
mod quarantine;
mod queue;
mod recovery;
mod remove;
mod save;
mod shared;
pub mod slab;
mod splits;
mod staged;
mod ticket;
mod tier;
mod token_file;
mod verify;
mod watch;
mod weights;
mod worker;
mod writer;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use gpu::Route;
pub use kv_cache::{KvCache, LoadChunk, StoreChunk};
pub use kvrail_cuda::probe::ProbeProgram;
pub use lmcache_names::LmcacheNames;
pub use metrics::MetricsSnapshot;
pub use namespace::Namespace;
pub use notice::{Notice, NoticeLevel};
pub use options::{Access, OpenOptions};
pub use ticket::{
    LoadReport, LoadTicket, LookupTicket, PresenceTicket, StoreReport, StoreTicket, Ticket,
};

use crate::chunk::{ChunkKey, Part};
use crate::config::StoreConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoEngine, MountReport};
use crate::layout::{KvLayout, TokenOrder};
use crate::memory::Region;
use shared::Running;

/// What a comparison of engines gets to end when the store is closed: far more than one transfer.
const COMPARISON_ENDS: Duration = Duration::from_secs(2);
/// How long a closing store tells files of uses.
const USES_LIMIT: Duration = Duration::from_secs(1);

/// A store of one namespace. Clones share it; its threads stop with the last of them.
#[derive(Debug, Clone)]
pub struct Store {
    running: Arc<Running>,
}

impl Store {
    /// Opens a store: creates what is missing (directories 0700, `manifest.json`), finds out what
    /// each mount can do, removes leftover temp files and starts the threads.
    ///
    /// Takes the same time however many chunks there are. A path that exists and cannot be
    /// written is used for loads only, with a notice.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for settings that cannot work, [`ErrorKind::Mismatch`] when a
    /// directory holds another namespace than its name says, [`ErrorKind::TimedOut`] when a mount
    /// does not answer, else the error of the system.
    pub fn open(config: &StoreConfig, namespace: Namespace, options: OpenOptions) -> Result<Self> {
        let running = open::open(config, namespace, &options, None)?;
        Ok(Self {
            running: Arc::new(running),
        })
    }

    /// Opens a store over another I/O engine than the one that the configuration asks for.
    ///
    /// For engines that wrap another one, as those of fault-injecting tests do.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_engine(
        config: &StoreConfig,
        namespace: Namespace,
        options: OpenOptions,
        engine: Arc<dyn IoEngine>,
    ) -> Result<Self> {
        let running = open::open(config, namespace, &options, Some(engine))?;
        Ok(Self {
            running: Arc::new(running),
        })
    }

    /// Looks up how many leading chunks of `keys` are present for `group` in all of `parts`, which
    /// are ranks or ranges of heads. A range also counts when files of other ranges hold it.
    ///
    /// Answered by the store's own threads; a chunk that turns out bad when it is loaded counts
    /// as present here.
    pub fn lookup(
        &self,
        group: u32,
        parts: &[impl Into<Part> + Copy],
        keys: Vec<ChunkKey>,
    ) -> LookupTicket {
        let parts: Vec<Part> = parts.iter().map(|part| (*part).into()).collect();
        self.running
            .lookups
            .submit(&self.running.shared, group, &parts, keys)
    }

    /// Looks up which of `keys` are present for `group` in all of `parts`, whichever are missing.
    ///
    /// For groups that need a window of chunks and not all of them. As [`Store::lookup`] otherwise;
    /// a lookup that takes too long finds nothing.
    pub fn lookup_each(
        &self,
        group: u32,
        parts: &[impl Into<Part> + Copy],
        keys: Vec<ChunkKey>,
    ) -> PresenceTicket {
        let parts: Vec<Part> = parts.iter().map(|part| (*part).into()).collect();
        self.running
            .lookups
            .submit_each(&self.running.shared, group, &parts, keys)
    }

    /// Removes the chunks of `keys` of `group` on `rank`, and waits for the file system to do so.
    /// Returns the bytes of each, 0 where there was none or it stayed, which is a notice.
    pub fn remove(&self, group: u32, rank: u32, keys: &[ChunkKey]) -> Vec<u64> {
        let places: Vec<_> = keys.iter().map(|key| (group, rank.into(), *key)).collect();
        remove::remove_chunks(&self.running.shared, &places)
    }

    /// Attaches the KV cache of `group` on one rank, `blocks_per_chunk` blocks to a chunk.
    ///
    /// `part` is what its files are named by: the rank, or, where all blocks of all layers have
    /// heads outermost, the stage and the heads that they hold. Chunks of such a part are also
    /// loaded from files of other ranges of heads.
    ///
    /// `regions` is the memory that `layout` speaks of, in its order.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when layout and regions do not fit, or a block is no whole
    /// number of bytes for each head,
    /// [`ErrorKind::InvalidConfig`] when the staging memory is smaller than one chunk.
    pub fn attach(
        &self,
        group: u32,
        part: impl Into<Part>,
        layout: KvLayout,
        regions: Vec<Region>,
        blocks_per_chunk: usize,
    ) -> Result<KvCache> {
        self.attach_by(group, part.into(), layout, regions, blocks_per_chunk, None)
    }

    /// As [`Store::attach`], for a store in LMCache's directory: `order` says how its files' order
    /// follows from the blocks.
    ///
    /// # Errors
    /// As [`Store::attach`], and [`ErrorKind::InvalidArgument`] when `order` is not that of the
    /// layout's blocks, [`ErrorKind::InvalidConfig`] when a chunk is not a number of whole pages.
    pub fn attach_by_tokens(
        &self,
        group: u32,
        rank: u32,
        layout: KvLayout,
        regions: Vec<Region>,
        blocks_per_chunk: usize,
        order: TokenOrder,
    ) -> Result<KvCache> {
        self.attach_by(
            group,
            rank.into(),
            layout,
            regions,
            blocks_per_chunk,
            Some(order),
        )
    }

    fn attach_by(
        &self,
        group: u32,
        part: Part,
        layout: KvLayout,
        regions: Vec<Region>,
        blocks_per_chunk: usize,
        order: Option<TokenOrder>,
    ) -> Result<KvCache> {
        let attachment = cache_shared::Attachment {
            group,
            part,
            layout,
            regions,
            blocks_per_chunk,
            order,
        };
        KvCache::new(Arc::clone(&self.running), attachment)
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.running.shared.namespace
    }

    /// Returns all counters.
    pub fn metrics(&self) -> MetricsSnapshot {
        let shared = &self.running.shared;
        let (used, janitors) = shared.capacity.gauges();
        shared.metrics.usage_bytes.set(used);
        shared.metrics.janitor_paths.set(janitors);
        shared.metrics.local_cpu_bytes.set(shared.tier.bytes());
        shared.metrics.set_io(&shared.io_counts());
        shared.metrics.snapshot()
    }

    /// Takes the notices that have come since the last call, oldest first; at most 100 wait.
    pub fn take_notices(&self) -> Vec<Notice> {
        self.running.shared.notices.take()
    }

    /// Returns what the store does on each path, and why.
    pub fn describe(&self) -> Vec<MountReport> {
        self.running
            .shared
            .mounts
            .iter()
            .map(|mount| mount.describe())
            .collect()
    }

    /// Waits until it is decided which engine moves the bytes of each path.
    ///
    /// With [`EngineChoice::Auto`](crate::config::EngineChoice::Auto) a path starts with posix, and
    /// the engines are compared when the store is open; [`Store::describe`] says so until then.
    /// Only who measures has a reason to wait.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when a comparison is under way after `limit`.
    pub fn wait_for_engines(&self, limit: Duration) -> Result<()> {
        if self.running.shared.comparisons.wait(limit) {
            return Ok(());
        }
        let seconds = limit.as_secs_f64();
        let message = format!("the I/O engines were not compared within {seconds:.3} s");
        Err(Error::new(ErrorKind::TimedOut, message))
    }

    /// Waits until all stores submitted so far have ended.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after `limit`.
    pub fn flush(&self, limit: Duration) -> Result<()> {
        if self.running.queue.wait_for_stores(limit) {
            return Ok(());
        }
        let message = format!("stores were not done within {:.3} s", limit.as_secs_f64());
        Err(Error::new(ErrorKind::TimedOut, message))
    }

    /// Waits for the stores, then ends everything: waiting loads end as failed, new calls too.
    ///
    /// Files are told of the last loads for a second at most, and then a comparison of engines and the
    /// janitors get what is left of `limit`, two seconds at most, to end their work.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when stores were not done within `limit`; they are given up.
    pub fn close(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now().checked_add(limit);
        self.running.shared.comparisons.stop();
        let flushed = self.flush(limit);
        let left = || deadline.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
        self.running.queue.wait_for_uses(left().min(USES_LIMIT));
        self.running.queue.close();
        // So that its file is gone. Whether it ended in time changes nothing here.
        let _ = self
            .running
            .shared
            .comparisons
            .wait(left().min(COMPARISON_ENDS));
        self.running.janitors.stop(left());
        flushed
    }
}
