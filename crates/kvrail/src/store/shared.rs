//! What the parts of a running store share.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::assemble::Windows;
use super::bad::BadChunks;
use super::capacity::{Capacity, Claim, JanitorThreads};
use super::comparisons::Comparisons;
use super::gpu::{CufileWish, GpuSide, Gpus, Opened};
use super::health::is_timeout;
use super::known::KnownAnswers;
use super::lmcache_names::LmcacheNames;
use super::lookup::LookupQueue;
use super::metrics::Metrics;
use super::mount::Mount;
use super::namespace::Namespace;
use super::notice::{Notices, Topic};
use super::open::thread_start;
use super::placement::Placement;
use super::present::{Place, PresentChunks};
use super::queue::TransferQueue;
use super::splits::Splits;
use super::tier::Tier;
use super::watch::Watch;
use super::writer::Writer;
use crate::chunk::{ChunkKey, Part};
use crate::config::Durability;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoCounts, IoEngine};
use crate::memory::{CopyMethod, HostArena, StagingPool, StagingRange};

/// Settings and state of a store, seen by all its threads.
#[derive(Debug)]
pub(super) struct StoreShared {
    pub(super) namespace: Namespace,
    pub(super) mounts: Vec<Arc<Mount>>,
    pub(super) placement: Placement,
    pub(super) writer: Arc<Writer>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) notices: Arc<Notices>,
    pub(super) present: PresentChunks,
    pub(super) bad: BadChunks,
    pub(super) chunk_size: usize,
    pub(super) durability: Durability,
    pub(super) wait_limit: Duration,
    pub(super) lookup_limit: Duration,
    pub(super) known: KnownAnswers,
    pub(super) watch: Watch,
    pub(super) comparisons: Comparisons,
    pub(super) may_write: bool,
    pub(super) buffer_mib: usize,
    /// Bytes of host memory that the tier may keep, 0 without one.
    pub(super) tier_bytes: usize,
    /// The folder of the memory that processes share, where the tier is that.
    pub(super) tier_folder: Option<PathBuf>,
    pub(super) pool: Mutex<Option<Pool>>,
    pub(super) tier: Tier,
    /// Memory for reading files of other ranges of heads.
    pub(super) windows: Windows,
    pub(super) splits: Splits,
    pub(super) gpus: Gpus,
    /// How GPUs copy pieces; `None`: what is the quickest.
    pub(super) copy_method: Option<CopyMethod>,
    pub(super) cufile: CufileWish,
    pub(super) capacity: Capacity,
    /// What files are named by where the directory is LMCache's.
    pub(super) lmcache: Option<LmcacheNames>,
}

/// The staging buffers of a store.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    pub(super) buffers: StagingPool,
    /// How many of them are for chunks on their way; the tier may keep the others.
    pub(super) staging: usize,
    slot_bytes: usize,
}

impl StoreShared {
    /// Returns the mount that holds a part of a chunk.
    #[expect(
        clippy::indexing_slicing,
        reason = "a store has at least one mount, the index is below"
    )]
    pub(super) fn mount(&self, part: Part, key: &ChunkKey) -> &Arc<Mount> {
        &self.mounts[self.mount_index(part, key)]
    }

    /// Returns the index of the mount that holds a part of a chunk.
    pub(super) fn mount_index(&self, part: Part, key: &ChunkKey) -> usize {
        self.placement.index(part, key)
    }

    /// Returns the engines that move bytes between files and staging memory, each once.
    fn engines(&self) -> Vec<Arc<dyn IoEngine>> {
        let mut engines: Vec<Arc<dyn IoEngine>> = Vec::new();
        for mount in &self.mounts {
            let engine = mount.engine.get();
            if !engines.iter().any(|known| Arc::ptr_eq(known, &engine)) {
                engines.push(engine);
            }
        }
        engines
    }

    /// Returns what they have counted together.
    pub(super) fn io_counts(&self) -> IoCounts {
        let from_page_cache = self
            .mounts
            .iter()
            .map(|mount| mount.engine.page_cache_bytes())
            .sum();
        let none = IoCounts {
            from_page_cache,
            ..IoCounts::default()
        };
        self.engines().iter().fold(none, |sum, engine| {
            let one = engine.counts();
            IoCounts {
                continued: sum.continued + one.continued,
                handed_over: sum.handed_over + one.handed_over,
                cancelled: sum.cancelled + one.cancelled,
                leaked: sum.leaked + one.leaked,
                held: sum.held + one.held,
                from_page_cache: sum.from_page_cache + one.from_page_cache,
            }
        })
    }

    /// Tells the engines of their memory, on a thread of its own: they may take as long as it takes
    /// to provide every page of it, and work meanwhile.
    fn prepare_engines(&self, pool: &StagingPool) {
        let (mut engines, pool) = (self.engines(), pool.clone());
        // That one has nothing to prepare.
        engines.retain(|engine| engine.name() != "posix");
        if engines.is_empty() {
            return;
        }
        let notices = Arc::clone(&self.notices);
        let on_start = thread_start(self.cufile.cpus.as_deref());
        let work = move || {
            on_start();
            for engine in engines {
                if let Err(reason) = engine.prepare(&pool) {
                    notices.warn(Topic::Engine, || reason);
                }
            }
        };
        // Without a thread for it they do without.
        let thread = std::thread::Builder::new().name("kvrail-prepare".to_owned());
        drop(thread.spawn(work));
    }

    /// Tells an engine that has just come into use of the staging memory, if there is some: what is
    /// made later is told to all engines that are in use then.
    pub(super) fn prepare_engine(&self, engine: &Arc<dyn IoEngine>) {
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = pool.as_ref().map(|pool| pool.buffers.clone());
        drop(pool);
        if let Some(Err(reason)) = buffers.map(|buffers| engine.prepare(&buffers)) {
            self.notices.warn(Topic::Engine, || reason);
        }
    }

    /// Takes note that cuFile failed where POSIX did not, or hung or lied (`at_once`): says so, and
    /// leaves the path to POSIX when it was one too many. That a GPU came late to what was asked of it
    /// is not cuFile's doing.
    pub(super) fn cufile_failed(&self, mount: &Mount, error: &Error, at_once: bool) {
        let path = mount.root.display();
        if error.kind() == ErrorKind::TimedOut && !is_timeout(error) {
            self.notices.warn(Topic::CufileFailed, || {
                format!("{path}: the GPU came too late for cuFile, POSIX did it instead: {error}")
            });
            return;
        }
        if mount.cufile.failed(error, at_once) {
            self.metrics.cufile_mounts_downgraded.add(1);
            self.notices.warn(Topic::CufileGivenUp, || {
                format!("{path}: POSIX moves the bytes from now on, cuFile failed: {error}")
            });
        } else {
            self.notices.warn(Topic::CufileFailed, || {
                format!("{path}: cuFile failed, POSIX did it instead: {error}")
            });
        }
    }

    /// Claims room for a chunk's file; what is refused is counted.
    pub(super) fn claim_room(&self, mount: &Mount, bytes: u64) -> Result<Claim<'_>> {
        let claim = self.capacity.claim(&mount.root, bytes);
        if claim.is_err() {
            self.metrics.stores_dropped_over_limit.add(1);
        }
        claim
    }

    /// Opens the memory that processes share; without it the store works as well.
    fn open_shared_tier(&self, folder: &Path, slot_bytes: usize) {
        let bytes = self.tier_bytes;
        if bytes < slot_bytes {
            return;
        }
        let opened = self
            .tier
            .open_shared(folder, self.namespace.id(), slot_bytes, bytes);
        match opened {
            // A few slots are left out, so that all sets are of one size.
            Ok(there) if there <= bytes && there >= bytes.saturating_sub(bytes / 8 + slot_bytes) => {}
            Ok(there) => self.notices.warn(Topic::Tier, || {
                format!(
                    "{}: the shared DRAM tier of this model has {:.3} GB, not {:.3}, as who made it wanted: others use it",
                    folder.display(),
                    there as f64 / 1e9,
                    bytes as f64 / 1e9
                )
            }),
            Err(error) => self.notices.warn(Topic::Tier, || {
                format!("going on without the shared DRAM tier: {error}")
            }),
        }
    }

    /// Copies a chunk to the memory that processes share.
    pub(super) fn keep_in_tier(&self, place: &Place, image: &StagingRange) {
        if let Err(error) = self.tier.fill(place, image) {
            self.metrics.local_cpu_inserts_failed.add(1);
            self.notices.warn(Topic::TierFull, || {
                format!("a chunk does not fit into the shared DRAM tier: {error}")
            });
        }
    }

    /// Returns the staging pool; the first KV cache that is attached decides about its slots.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) when not one slot fits into
    /// the configured size, or a later KV cache has larger chunks;
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu) when the memory cannot be pinned for `gpu`.
    pub(super) fn staging_pool(&self, slot_bytes: usize, gpu: Option<&Opened>) -> Result<Pool> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let pool_bytes = self.buffer_mib << 20;
        if let Some(pool) = pool.as_ref() {
            let size = pool.slot_bytes;
            if slot_bytes <= size {
                return Ok(pool.clone());
            }
            let message = format!("chunk files of at most {size} bytes, as the first KV cache has");
            return Err(Error::config("chunk_size", slot_bytes, message));
        }
        if pool_bytes < slot_bytes {
            let expected = format!(
                "at least {} (MiB): one chunk of {} tokens of this model is a file of {slot_bytes} bytes",
                slot_bytes.div_ceil(1 << 20),
                self.chunk_size
            );
            return Err(Error::config(
                "cufile_buffer_size",
                self.buffer_mib,
                expected,
            ));
        }
        let staging = match gpu {
            None => pool_bytes,
            Some(opened) => pool_bytes.min(GpuSide::pinned_bytes(opened, slot_bytes)),
        } / slot_bytes;
        let kept = match self.tier_folder {
            Some(_) => 0,
            None => self.tier_bytes / slot_bytes,
        };
        let bytes = (staging + kept) * slot_bytes;
        let buffers = match gpu {
            None => StagingPool::new(bytes, slot_bytes)?,
            Some(opened) => {
                let arena = HostArena::pinned(bytes, opened.gpu.context())?;
                StagingPool::over(arena, slot_bytes)?
            }
        };
        match &self.tier_folder {
            Some(folder) => self.open_shared_tier(folder, slot_bytes),
            None => self.tier.open_own(kept, slot_bytes),
        }
        self.prepare_engines(&buffers);
        let made = Pool {
            buffers,
            staging,
            slot_bytes,
        };
        *pool = Some(made.clone());
        Ok(made)
    }
}

/// What the janitors get to end when a store is dropped and not closed: far more than their work
/// takes where the mount answers.
const JANITORS_END: Duration = Duration::from_secs(1);

/// A store's threads; they stop when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) shared: Arc<StoreShared>,
    pub(super) queue: Arc<TransferQueue>,
    pub(super) lookups: LookupQueue,
    pub(super) janitors: JanitorThreads,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.comparisons.stop();
        self.queue.close();
        self.shared.watch.close();
        // They make files: whoever drops a store may remove its directory then.
        self.janitors.stop(JANITORS_END);
    }
}
