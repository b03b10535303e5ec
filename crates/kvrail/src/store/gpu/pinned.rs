//! KV cache in the memory of a GPU: through VRAM slots and pinned staging buffers.
//!
//! Store: gather into a VRAM slot on the compute stream, then, on a stream of our own, page hashes
//! and one large copy to the staging buffer. Load: one large copy to a VRAM slot, page hashes,
//! and, once the hashes are found right, scatter. The GPU hashes, so the CPU touches no payload.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvrail_cuda::{Cuda, Event, LibraryPaths, Stream};

use super::image::Extents;
use super::kv_cache::CacheShared;
use super::load::{LoadJob, verify};
use super::staged::StagedImage;
use crate::chunk::{ChunkFormat, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{KvLayout, TransferPlan};
use crate::memory::{
    ComputeStream, Device, Gpu, GpuSlot, GpuSlots, Region, SlotShape, StagingRange,
};

/// VRAM slots of a KV cache at most. What goes through them is on its way between two memories:
/// a few hide the latency of each other's copies, more only take memory from the KV cache.
const SLOTS_MAX: usize = 16;
/// How long an error waits for the GPU to let go of what it works on, before it asks again or
/// gives the memory up.
const GRACE: Duration = Duration::from_secs(1);
/// Refusals of the driver after which a load that failed takes the GPU for dead.
const REFUSALS_MAX: usize = 3;

/// The GPUs that a store uses, opened when the first KV cache on them is attached.
#[derive(Debug)]
pub(super) struct Gpus {
    libraries: LibraryPaths,
    open: Mutex<HashMap<usize, Gpu>>,
}

impl Gpus {
    pub(super) fn new(libraries: LibraryPaths) -> Self {
        Self {
            libraries,
            open: Mutex::default(),
        }
    }

    /// Returns the GPU with this ordinal.
    fn get(&self, ordinal: usize) -> Result<Gpu> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let cuda = Cuda::load(&self.libraries.cuda)
            .map_err(|error| Error::gpu(format!("KV cache on cuda:{ordinal}"), error))?;
        let gpu = Gpu::open(&cuda, ordinal)?;
        open.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    /// Returns the GPU that holds all of `regions`, `None` for host memory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for regions of several devices, [`ErrorKind::Gpu`].
    pub(super) fn of(&self, regions: &[Region]) -> Result<Option<Gpu>> {
        let device = regions.first().map_or(Device::Host, Region::device);
        if let Some(other) = regions.iter().find(|region| region.device() != device) {
            let message = format!("a KV cache on {device} and {}", other.device());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        match device {
            Device::Host => Ok(None),
            Device::Cuda(ordinal) => self.get(ordinal).map(Some),
        }
    }
}

/// What an attached KV cache on a GPU has beside its staging buffers.
#[derive(Debug)]
pub(super) struct GpuSide {
    gpu: Gpu,
    slots: GpuSlots,
}

impl GpuSide {
    /// Allocates the VRAM slots: as many as there are staging buffers, 16 at most, fewer where the
    /// GPU has not so much memory left.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] when there is no VRAM for a single slot.
    pub(super) fn new(
        gpu: Gpu,
        layout: &KvLayout,
        format: &ChunkFormat,
        blocks: usize,
        buffers: usize,
    ) -> Result<Self> {
        let shape = SlotShape::new(layout, format, blocks);
        let mut count = buffers.clamp(1, SLOTS_MAX);
        loop {
            match GpuSlots::new(&gpu, shape, count) {
                Ok(slots) => return Ok(Self { gpu, slots }),
                Err(error) if count == 1 => return Err(error),
                Err(_) => count /= 2,
            }
        }
    }

    /// Says what was found and set up, in words.
    pub(super) fn describe(&self, buffers: usize) -> String {
        format!(
            "KV cache on cuda:{}: {} VRAM slots, {buffers} pinned staging buffers, pieces copied by {}, \
             pages hashed by the {}: {}",
            self.gpu.context().ordinal(),
            self.slots.slot_count(),
            self.gpu.method(),
            if self.hashes() { "GPU" } else { "CPU" },
            self.gpu.reason()
        )
    }

    /// Returns whether the GPU hashes pages.
    pub(super) fn hashes(&self) -> bool {
        self.gpu.kernels().is_some()
    }

    /// Marks what the serving engine has put on its stream so far.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`].
    pub(super) fn mark(&self, compute: ComputeStream) -> Result<Arc<Event>> {
        let stream = self.gpu.compute_stream(compute);
        self.gpu.mark(&stream).map(Arc::new)
    }

    /// Puts the way of a chunk from its blocks to `image` on the GPU; `None` without a free slot.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for blocks outside the KV cache, [`ErrorKind::Gpu`].
    pub(super) fn stage(
        &self,
        cache: &CacheShared,
        blocks: &[usize],
        image: StagingRange,
        compute: ComputeStream,
    ) -> Result<Option<StagedImage>> {
        let plan = TransferPlan::new(&cache.layout, blocks)?;
        let Some(mut slot) = self.slots.try_take(&self.gpu, 0) else {
            return Ok(None);
        };
        let compute = self.gpu.compute_stream(compute);
        let own = self.gpu.store_stream();
        let mut image = image;
        let mut head = image.split_to(PAGE_BYTES);
        let staged = self.stage_on(cache, &plan, &mut slot, &mut image, &compute, own);
        match staged.and_then(|()| slot.release_marked()) {
            Ok(event) => {
                // The parts of one slot, in order: this cannot fail.
                if head.rejoin(image).is_err() {
                    return Ok(None);
                }
                Ok(Some(StagedImage::arriving(head, event, self.hashes())))
            }
            Err(error) => {
                let deadline = Instant::now() + GRACE;
                let settled = [&compute, own].map(|stream| slot.settle(stream, deadline));
                if settled.iter().any(Result::is_err) {
                    std::mem::forget(image);
                }
                Err(error)
            }
        }
    }

    fn stage_on(
        &self,
        cache: &CacheShared,
        plan: &TransferPlan,
        slot: &mut GpuSlot,
        rest: &mut StagingRange,
        compute: &Stream,
        own: &Stream,
    ) -> Result<()> {
        let format = &cache.format;
        let start = format.payload_offset();
        let end = start + format.payload_bytes();
        let table = format.table_offset();
        // What the file has behind payload and hashes is zero.
        let zeros = [
            end..end + format.pad_bytes(),
            table + format.page_count() * 8..table + format.table_bytes(),
        ];
        slot.gather(compute, plan, &cache.regions, start, &zeros)?;
        slot.mark(compute)?;
        slot.order_after_mark(own)?;
        if self.hashes() {
            slot.hash_pages(own, start, format.page_count(), Some(table))?;
        }
        slot.fetch(own, start..format.file_bytes(), rest)?;
        slot.mark(own)
    }

    /// Brings a chunk that was read to its blocks, if it is what it should be.
    ///
    /// `image` holds head, pages and page table one behind the other; `computed` are the hashes
    /// of the pages where the CPU made them.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] for a chunk that is not, [`ErrorKind::TimedOut`],
    /// [`ErrorKind::Gpu`].
    pub(super) fn finish_load(
        &self,
        job: &LoadJob,
        image: StagingRange,
        extents: &Extents,
        computed: &[u64],
        deadline: Instant,
    ) -> Result<()> {
        let mut slot = self.slots.take(&self.gpu, deadline)?;
        let stream = self.gpu.load_stream();
        let result = self.load_on(job, &image, extents, computed, &mut slot, stream, deadline);
        if result.is_err() && !wait_out(&mut slot, stream) {
            std::mem::forget(image);
        }
        result
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one load, in one place"
    )]
    fn load_on(
        &self,
        job: &LoadJob,
        image: &StagingRange,
        extents: &Extents,
        computed: &[u64],
        slot: &mut GpuSlot,
        stream: &Stream,
        deadline: Instant,
    ) -> Result<()> {
        let pages = extents.pages.len();
        let end = PAGE_BYTES + pages * PAGE_BYTES;
        slot.send(stream, image, 0..end)?;
        if self.hashes() {
            slot.hash_pages(stream, PAGE_BYTES, pages, None)?;
            slot.fetch_hashes(stream, pages)?;
            slot.mark(stream)?;
            slot.wait(deadline)?;
            verify(job, image.as_slice(), extents, &slot.hashes(pages)?)?;
        } else {
            verify(job, image.as_slice(), extents, computed)?;
        }
        let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
        let at = PAGE_BYTES + job.payload.start - extents.pages.start * PAGE_BYTES;
        // What was on the compute stream when the load was asked for may still use the blocks: a
        // forward that writes behind the end of their last owner, a gather that reads them.
        if let Some(before) = &job.after {
            let ordered = stream.wait_for(before);
            ordered.map_err(|error| Error::gpu("order a load behind the forward", error))?;
        }
        slot.scatter(stream, &plan, &job.cache.regions, at)?;
        slot.mark(stream)?;
        slot.wait(deadline)
    }
}

/// Waits, after an error, until the GPU is through with a load, however long that takes; returns
/// whether it is, `false` for a GPU that does not answer any more.
///
/// The blocks are computed anew once the load has ended, so it must not end while a scatter may
/// still write to them. The serving engine waits for the same GPU all the while.
fn wait_out(slot: &mut GpuSlot, stream: &Stream) -> bool {
    let mut refusals = 0;
    while refusals < REFUSALS_MAX {
        match slot.settle(stream, Instant::now() + GRACE) {
            Ok(()) => return true,
            Err(error) if error.kind() == ErrorKind::TimedOut => {}
            Err(_) => refusals += 1,
        }
    }
    false
}
