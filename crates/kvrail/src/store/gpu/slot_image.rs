//! Through a VRAM slot, by cuFile: gather, hash, write; read, hash, verify, scatter.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail_cuda::Stream;

use super::cufile::wait_all;
use super::pinned::wait_out;
use super::side::GpuSide;
use crate::chunk::{ChunkHead, ChunkRef, PAGE_BYTES, root_checksum};
use crate::error::Result;
use crate::io::{IoFile, Operation};
use crate::layout::TransferPlan;
use crate::memory::{ComputeStream, GpuSlot, PagesInSlot, StagingRange};
use crate::store::cache_shared::CacheShared;
use crate::store::image::Extents;
use crate::store::load_job::LoadJob;
use crate::store::staged::StagedImage;
use crate::store::verify::{bad_page, verify, verify_frame};

/// How long an error waits for the GPU to let go of what it works on, before it asks again or
/// gives the memory up.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// A chunk on its way out in a VRAM slot: payload and page table are there, or will be.
#[derive(Debug)]
pub(in crate::store) struct SlotImage {
    slot: GpuSlot,
}

impl GpuSide {
    /// Puts the way of a chunk from its blocks to a slot on the GPU; `None` unless more than
    /// `reserve` slots are free.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for blocks outside the KV
    /// cache, [`ErrorKind::Gpu`](crate::ErrorKind::Gpu).
    pub(in crate::store) fn stage_slot(
        &self,
        cache: &CacheShared,
        blocks: &[usize],
        reserve: usize,
        compute: ComputeStream,
    ) -> Result<Option<SlotImage>> {
        let plan = TransferPlan::new(&cache.layout, blocks)?;
        let Some(mut slot) = self.slots.try_take(&self.gpu, reserve) else {
            return Ok(None);
        };
        let compute = self.gpu.compute_stream(compute);
        let own = self.gpu.store_stream();
        let staged = slot
            .gather_chunk(&cache.format, &plan, &cache.regions, &compute, own)
            .and_then(|()| slot.fetch_frame(own, cache.format.table_offset()))
            .and_then(|()| slot.mark(own));
        match staged {
            Ok(()) => Ok(Some(SlotImage { slot })),
            Err(error) => {
                give_up(&mut slot, [&compute, own]);
                Err(error)
            }
        }
    }

    /// Reads a chunk into `slot`, verifies it and copies it to its blocks.
    ///
    /// # Errors
    /// Of cuFile and the driver; [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) when what came
    /// is not what it should be, [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut).
    pub(in crate::store) fn load_slot(
        &self,
        job: &LoadJob,
        mut slot: GpuSlot,
        file: &Arc<IoFile>,
        deadline: Instant,
    ) -> Result<()> {
        let stream = self.gpu.load_stream();
        let loaded = self.load_slot_on(job, &mut slot, stream, file, deadline);
        if loaded.is_err() {
            wait_out(&mut slot, stream);
        }
        loaded
    }

    fn load_slot_on(
        &self,
        job: &LoadJob,
        slot: &mut GpuSlot,
        stream: &Stream,
        file: &Arc<IoFile>,
        deadline: Instant,
    ) -> Result<()> {
        let cufile = self.cufile()?;
        let extents = Extents::new(&job.cache.format, &job.payload);
        let mut handles = Vec::new();
        let mut at = 0;
        for range in &extents.ranges {
            let part = slot.share(at..at + range.len())?;
            handles.extend(cufile.submit(Operation::Read, file, range.start, part));
            at += range.len();
        }
        wait_all(handles, deadline)?;
        let table = PAGE_BYTES + extents.pages.len() * PAGE_BYTES;
        if self.gpu.hashes_on_the_way() {
            slot.fetch_frame(stream, table)?;
            slot.mark(stream)?;
            slot.wait(deadline)?;
            let (head, table) = slot.frame()?;
            verify_frame(job, head, table)?;
            if self.place_verified(job, slot, stream, &extents.pages, deadline)? {
                return Ok(());
            }
        }
        let pages = extents.pages.len();
        slot.hash_pages(stream, PAGE_BYTES, pages, None)?;
        slot.fetch_hashes(stream, pages)?;
        slot.fetch_frame(stream, table)?;
        slot.mark(stream)?;
        slot.wait(deadline)?;
        let (head, table) = slot.frame()?;
        verify(job, head, table, &extents.pages, &slot.hashes(pages)?)?;
        self.place(job, slot, stream, &extents.pages, deadline)
    }

    /// Copies pages in a slot, found right before, to the blocks of a load, and waits for it.
    pub(super) fn place(
        &self,
        job: &LoadJob,
        slot: &mut GpuSlot,
        stream: &Stream,
        pages: &Range<usize>,
        deadline: Instant,
    ) -> Result<()> {
        let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
        job.order_after(stream)?;
        slot.scatter(
            stream,
            &plan,
            &job.cache.regions,
            in_slot(job, pages).payload,
        )?;
        slot.mark(stream)?;
        slot.wait(deadline)
    }

    /// Has the GPU verify pages in a slot, behind which their page table lies, already found right,
    /// and copy them to the blocks of a load, and waits for it. Returns whether that is possible
    /// with such blocks.
    ///
    /// # Errors
    /// As [`GpuSide::load_slot`]; of a bad page nothing was copied.
    pub(super) fn place_verified(
        &self,
        job: &LoadJob,
        slot: &mut GpuSlot,
        stream: &Stream,
        pages: &Range<usize>,
        deadline: Instant,
    ) -> Result<bool> {
        let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
        job.order_after(stream)?;
        if !slot.scatter_verified(stream, &plan, &job.cache.regions, in_slot(job, pages))? {
            return Ok(false);
        }
        slot.mark(stream)?;
        slot.wait(deadline)?;
        match slot.bad_page()? {
            None => Ok(true),
            Some(page) => Err(bad_page(&job.cache.format, pages.start + page)),
        }
    }
}

/// Returns where a load's pages lie in a slot: behind the head, the page table behind them.
fn in_slot(job: &LoadJob, pages: &Range<usize>) -> PagesInSlot {
    PagesInSlot {
        start: PAGE_BYTES,
        count: pages.len(),
        expected: PAGE_BYTES + pages.len() * PAGE_BYTES + pages.start * 8,
        payload: PAGE_BYTES + job.payload.start - pages.start * PAGE_BYTES,
    }
}

impl SlotImage {
    /// Returns whether the GPU is not there yet.
    pub(in crate::store) fn is_pending(&self) -> bool {
        self.slot.is_pending()
    }

    /// Writes the image to a file.
    ///
    /// # Errors
    /// As [`GpuSide::load_slot`]; the image is unchanged.
    pub(in crate::store) fn write(
        &mut self,
        side: &GpuSide,
        cache: &CacheShared,
        chunk: ChunkRef,
        file: &Arc<IoFile>,
        deadline: Instant,
    ) -> Result<()> {
        send_head(side, cache, chunk, &mut self.slot, deadline)?;
        let image = self.slot.share(0..cache.format.file_bytes())?;
        let cufile = side.cufile()?;
        cufile.transfer(Operation::Write, file, 0, image, deadline)
    }

    /// Copies the image to a pinned buffer, as long as the file, for POSIX to write.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut),
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu).
    pub(in crate::store) fn into_host(
        mut self,
        side: &GpuSide,
        buffer: StagingRange,
        deadline: Instant,
    ) -> Result<StagedImage> {
        self.slot.wait(deadline)?;
        side.fetch_image(side.gpu.store_stream(), self.slot, buffer, true)
    }
}

/// Waits a moment, after an error, for what was put on the streams. A slot that takes longer is used
/// again when the GPU is through with it.
pub(super) fn give_up(slot: &mut GpuSlot, [first, last]: [&Stream; 2]) {
    drop(slot.settle_both(first, last, Instant::now() + GRACE));
}

/// Makes the head of a chunk whose page table is on the host, and puts it into the image.
pub(super) fn send_head(
    side: &GpuSide,
    cache: &CacheShared,
    chunk: ChunkRef,
    slot: &mut GpuSlot,
    deadline: Instant,
) -> Result<()> {
    slot.wait(deadline)?;
    let head = ChunkHead {
        fields: cache.head_fields(chunk),
        format: cache.format,
        root: root_checksum(slot.frame()?.1),
    };
    head.encode_into(slot.head_mut()?)?;
    let own = side.gpu.store_stream();
    slot.send_head(own)?;
    slot.mark(own)?;
    slot.wait(deadline)
}
