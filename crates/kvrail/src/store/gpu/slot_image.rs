//! Through a VRAM slot, by cuFile: gather, hash, write; read, hash, verify, scatter.

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
use crate::memory::{ComputeStream, GpuSlot, StagingRange};
use crate::store::cache_shared::CacheShared;
use crate::store::image::Extents;
use crate::store::load_job::LoadJob;
use crate::store::staged::StagedImage;
use crate::store::verify::verify;

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
        let staged = self
            .gather_chunk(cache, &plan, &mut slot, &compute, own)
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

    /// Gathers a chunk on `compute` and hashes it, where the GPU does, on `own`.
    pub(super) fn gather_chunk(
        &self,
        cache: &CacheShared,
        plan: &TransferPlan,
        slot: &mut GpuSlot,
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
        Ok(())
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
        let pages = extents.pages.len();
        let table = PAGE_BYTES + pages * PAGE_BYTES;
        slot.hash_pages(stream, PAGE_BYTES, pages, None)?;
        slot.fetch_hashes(stream, pages)?;
        slot.fetch_frame(stream, table)?;
        slot.mark(stream)?;
        slot.wait(deadline)?;
        let (head, table) = slot.frame()?;
        verify(job, head, table, &extents.pages, &slot.hashes(pages)?)?;
        let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
        let at = PAGE_BYTES + job.payload.start - extents.pages.start * PAGE_BYTES;
        job.order_after(stream)?;
        slot.scatter(stream, &plan, &job.cache.regions, at)?;
        slot.mark(stream)?;
        slot.wait(deadline)
    }
}

impl SlotImage {
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

/// Waits, after an error, for what was put on the streams. A slot that cannot be waited for is not
/// used again.
pub(super) fn give_up(slot: &mut GpuSlot, streams: [&Stream; 2]) {
    let deadline = Instant::now() + GRACE;
    for stream in streams {
        drop(slot.settle(stream, deadline));
    }
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
