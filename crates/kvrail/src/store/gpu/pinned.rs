//! Through a VRAM slot and a pinned staging buffer, for POSIX to write and read.
//!
//! Store: gather into a VRAM slot on the compute stream, then, on a stream of our own, page hashes
//! and one large copy to the staging buffer. Load: one large copy to a VRAM slot, page hashes,
//! and, once the hashes are found right, scatter. The GPU hashes, so the CPU touches no payload.

use std::sync::Arc;
use std::time::Instant;

use kvrail_cuda::Stream;

use super::side::GpuSide;
use super::slot_image::{GRACE, give_up};
use crate::chunk::{PAGE_BYTES, hash_pages};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::{ComputeStream, GpuSlot, StagingRange};
use crate::store::cache_shared::{CacheShared, left_to_loads};
use crate::store::image::{self, Extents};
use crate::store::load_job::LoadJob;
use crate::store::metrics::Metrics;
use crate::store::staged::StagedImage;
use crate::store::verify::{verify, verify_frame};

/// Refusals of the driver after which whoever waits takes the GPU for dead.
pub(super) const REFUSALS_MAX: usize = 3;

impl GpuSide {
    /// Puts the way of a chunk from its blocks to `image` on the GPU; `None` when all slots are in
    /// the hands of others.
    ///
    /// Where all of them are still being copied to pinned memory, what `compute` does from now on
    /// waits for one of these copies: a millisecond for 50 MB, where the chunk would be computed anew.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for blocks outside the KV cache, [`ErrorKind::Gpu`].
    pub(in crate::store) fn stage(
        &self,
        cache: &CacheShared,
        blocks: &[usize],
        image: StagingRange,
        compute: ComputeStream,
        metrics: &Metrics,
    ) -> Result<Option<StagedImage>> {
        let plan = TransferPlan::new(&cache.layout, blocks)?;
        let compute = self.gpu.compute_stream(compute);
        let own = self.gpu.store_stream();
        // Loads wait for a slot that is free: none would be while each step stores more than there are.
        let reserve = left_to_loads(self.slots.slot_count());
        let Some(mut slot) = self.slots.take_behind(&self.gpu, &compute, reserve)? else {
            return Ok(None);
        };
        metrics
            .stores_waited_for_slot
            .add(u64::from(slot.is_busy()));
        let gathered = slot.gather_chunk(&cache.format, &plan, &cache.regions, &compute, own);
        match gathered {
            Ok(()) => self.fetch_image(own, slot, image, self.hashes()).map(Some),
            Err(error) => {
                give_up(&mut slot, [&compute, own]);
                Err(error)
            }
        }
    }

    /// Puts the copy of an image, all but the head, to a pinned buffer on `own`, behind whatever
    /// is there.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`]; then the buffer is lost if the GPU may still write there.
    pub(super) fn fetch_image(
        &self,
        own: &Stream,
        mut slot: GpuSlot,
        image: StagingRange,
        hashed: bool,
    ) -> Result<StagedImage> {
        let mut image = image;
        let end = image.len();
        let mut head = image.split_to(PAGE_BYTES);
        let fetched = slot
            .fetch(own, PAGE_BYTES..end, &mut image)
            .and_then(|()| slot.mark(own))
            .and_then(|()| slot.release_marked());
        match fetched {
            Ok(event) => {
                head.rejoin(image).map_err(|_| {
                    Error::new(ErrorKind::InvalidArgument, "parts of two staging buffers")
                })?;
                Ok(StagedImage::arriving(head, event, &self.late, hashed))
            }
            Err(error) => {
                if slot.settle(own, Instant::now() + GRACE).is_err() {
                    std::mem::forget(image);
                }
                Err(error)
            }
        }
    }

    /// Brings a chunk that was read to its blocks, if it is what it should be.
    ///
    /// `image` holds head, pages and page table one behind the other; `computed` are the hashes
    /// of the pages where the CPU made them.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] for a chunk that is not, [`ErrorKind::TimedOut`],
    /// [`ErrorKind::Gpu`].
    pub(in crate::store) fn finish_load(
        &self,
        job: &LoadJob,
        image: &Arc<StagingRange>,
        extents: &Extents,
        computed: &[u64],
        deadline: Instant,
    ) -> Result<()> {
        let mut slot = self.slots.take(&self.gpu, deadline)?;
        let stream = self.gpu.load_stream();
        let result = self.load_on(job, image, extents, computed, &mut slot, stream, deadline);
        if result.is_err() && !wait_out(&mut slot, stream) {
            // The GPU may still read it, so its buffer never comes back.
            std::mem::forget(Arc::clone(image));
        }
        result
    }

    /// Brings a chunk from the image of its whole file to its blocks, as [`Self::finish_load`].
    ///
    /// # Errors
    /// As [`Self::finish_load`].
    pub(in crate::store) fn load_image(
        &self,
        job: &LoadJob,
        image: &Arc<StagingRange>,
        deadline: Instant,
    ) -> Result<()> {
        let format = &job.cache.format;
        let extents = Extents::new(format, &(0..format.payload_bytes()));
        let mut computed = vec![
            0;
            if self.hashes() {
                0
            } else {
                extents.pages.len()
            }
        ];
        let pages = format.payload_offset()..format.table_offset();
        hash_pages(image::bytes_of(image.as_slice(), pages)?, &mut computed);
        self.finish_load(job, image, &extents, &computed, deadline)
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
        let (head, table) = image::frame(image.as_slice(), extents)?;
        if self.gpu.hashes_on_the_way() {
            verify_frame(job, head, table)?;
            // With the page table, which the GPU compares with.
            let end = PAGE_BYTES + pages * PAGE_BYTES + table.len();
            slot.send(stream, image, 0..end)?;
            if self.place_verified(job, slot, stream, &extents.pages, deadline)? {
                return Ok(());
            }
        } else {
            slot.send(stream, image, 0..PAGE_BYTES + pages * PAGE_BYTES)?;
        }
        if self.hashes() {
            slot.hash_pages(stream, PAGE_BYTES, pages, None)?;
            slot.fetch_hashes(stream, pages)?;
            slot.mark(stream)?;
            slot.wait(deadline)?;
            verify(job, head, table, &extents.pages, &slot.hashes(pages)?)?;
        } else {
            verify(job, head, table, &extents.pages, computed)?;
        }
        self.place(job, slot, stream, &extents.pages, deadline)
    }
}

/// Waits, after an error, until the GPU is through with a load, however long that takes; returns
/// whether it is, `false` for a GPU that does not answer any more.
///
/// The blocks are computed anew once the load has ended, so it must not end while a scatter may
/// still write to them. The serving engine waits for the same GPU all the while.
pub(super) fn wait_out(slot: &mut GpuSlot, stream: &Stream) -> bool {
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
