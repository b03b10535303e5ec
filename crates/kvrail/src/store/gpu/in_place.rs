//! In place, by cuFile: the blocks of the KV cache themselves are written and read; no copy.
//!
//! For layouts whose blocks lie as a whole, all layers of a block one behind the other, and fill
//! pages. Head and page table go through a little VRAM slot of their own.
//!
//! A store cannot keep vLLM from giving the blocks to somebody else while they are written, and
//! need not: their pages are hashed on the compute stream, where the blocks are still whole, and
//! hashed again after they were written. Only if both agree is the chunk published, so what was
//! written is what was hashed. Were the bytes different only in between, the chunk's own checksums
//! would tell at its first load.
//!
//! A load writes to blocks before they, or even head and page table, are verified. They are the
//! load's alone, and blocks of a load that failed are computed anew. But it must not end before
//! cuFile has let go of them, even if that never happens: a late write would hit whoever has the
//! blocks then.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cufile::{Cufile, wait_all};
use super::shared_memory::SharedMemory;
use super::side::{GpuSide, Shape};
use super::slot_image::{GRACE, give_up, send_head};
use crate::chunk::{ChunkRef, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Cancelled, IoFile, Operation, PieceHandle, PieceRequest, within};
use crate::layout::TransferPlan;
use crate::memory::{
    ComputeStream, Gpu, GpuSlot, GpuSlots, RegisteredRegion, SlotShape, StagingRange,
};
use crate::store::cache_shared::CacheShared;
use crate::store::image::CUFILE_REQUEST_BYTES;
use crate::store::load_job::LoadJob;
use crate::store::shared::StoreShared;
use crate::store::staged::StagedImage;
use crate::store::verify::{verify, verify_frame};

/// Chunks on their way: as many as staging buffers of `cufile_buffer_size` would hold, though none
/// are needed, at least as many as cuFile may have calls, and no more than this. Each has a slot for
/// head, page table and hashes: 136 KiB of VRAM for a chunk of 32 MiB.
const FRAMES: RangeInclusive<usize> = 64..=1024;
/// The longest that the registration of a KV cache may take: tens of gigabytes are pinned.
const REGISTER_LIMIT: Duration = Duration::from_secs(60);

/// A KV cache that cuFile knows.
#[derive(Debug)]
pub(super) struct InPlace {
    /// Slots for head and page table.
    pub(super) slots: GpuSlots,
    regions: Vec<Arc<RegisteredRegion>>,
}

/// A chunk on its way out that stays where it is; only its page table is hashed already.
#[derive(Debug)]
pub(in crate::store) struct InPlaceImage {
    slot: GpuSlot,
    plan: TransferPlan,
}

/// How a load in place failed.
#[derive(Debug)]
pub(in crate::store) enum InPlaceFailure {
    /// It is over, and nothing touches the blocks any more.
    Over(Error),
    /// cuFile did not return in time, and may still write to the blocks.
    Hangs(Error, Vec<PieceHandle>),
}

impl From<Error> for InPlaceFailure {
    fn from(error: Error) -> Self {
        Self::Over(error)
    }
}

impl InPlace {
    /// Registers the KV cache, or says in words why it is not read and written in place.
    pub(super) fn new(
        store: &StoreShared,
        gpu: &Gpu,
        cufile: &Cufile,
        memory: &Arc<SharedMemory>,
        shape: Shape<'_>,
    ) -> Result<Self, String> {
        if let Some(reason) = &store.cufile.no_in_place {
            return Err(reason.clone());
        }
        check_shape(shape)?;
        let regions = shape.regions.to_vec();
        let (driver, context) = (cufile.driver.clone(), gpu.context().clone());
        let registered = within(REGISTER_LIMIT, "cuFileBufRegister of the KV cache", {
            let memory = Arc::clone(memory);
            move || -> Result<Vec<Arc<RegisteredRegion>>> {
                let register = |region| memory.register(region, &driver, &context);
                regions.into_iter().map(register).collect()
            }
        });
        let registered = registered.and_then(|regions| regions);
        let regions = registered.map_err(|error| error.to_string())?;
        // Each KV cache group has its own, small as they are: a step stores the chunks of one group
        // after those of another, and of a chunk that one group lost the others are of no use.
        let frame = SlotShape::frame(shape.format, shape.blocks);
        let frames = (store.buffer_mib << 20) / shape.format.file_bytes();
        let frames = frames.clamp(*FRAMES.start(), *FRAMES.end());
        let (driver, device) = (cufile.driver.clone(), gpu.clone());
        let slots = within(REGISTER_LIMIT, "cuFileBufRegister", move || {
            GpuSlots::new(&device, frame, frames, frames, Some(&driver))
        });
        let slots = slots.and_then(|slots| slots);
        let slots = slots.map_err(|error| error.to_string())?;
        Ok(Self { slots, regions })
    }

    /// Submits the transfer of what `plan` names, which lies at `offset` of the file.
    fn submit(
        &self,
        cufile: &Cufile,
        operation: Operation,
        file: &Arc<IoFile>,
        plan: &TransferPlan,
        offset: usize,
    ) -> Result<Vec<PieceHandle>> {
        let mut requests: Vec<PieceRequest> = Vec::new();
        let mut offset = offset as u64;
        let mut room = 0;
        let mut last_region = None;
        for range in plan.ranges() {
            let memory = self.regions.get(range.region).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    "a region that is not registered",
                )
            })?;
            let mut at = range.offset;
            let end = range.offset + range.bytes;
            while at < end {
                if room == 0 || last_region != Some(range.region) {
                    room = CUFILE_REQUEST_BYTES;
                    last_region = Some(range.region);
                    requests.push(PieceRequest {
                        operation,
                        file: Arc::clone(file),
                        offset,
                        memory: Arc::clone(memory),
                        pieces: Vec::new(),
                    });
                }
                let bytes = (end - at).min(room);
                if let Some(request) = requests.last_mut() {
                    request.pieces.push(at..at + bytes);
                }
                at += bytes;
                room -= bytes;
                offset += bytes as u64;
            }
        }
        let submit = |request| cufile.engine.submit_pieces(request);
        Ok(requests.into_iter().map(submit).collect())
    }
}

/// Checks that every block is one run of whole pages; the error says what is not.
fn check_shape(shape: Shape<'_>) -> Result<(), String> {
    let layout = shape.layout;
    let last = layout.block_count() - 1;
    for block in [0, last] {
        let plan = TransferPlan::new(layout, &[block]).map_err(|error| error.to_string())?;
        let [range] = plan.ranges() else {
            let count = plan.ranges().len();
            return Err(format!(
                "a block lies in {count} pieces; vLLM's layouts BLNHC and BLHNC have one"
            ));
        };
        let base = shape.regions.get(range.region);
        let base = base.and_then(|region| region.device_span(0, 1).ok());
        let is_aligned = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES as u64);
        if !is_aligned(range.offset as u64 | range.bytes as u64 | base.unwrap_or(1)) {
            return Err(format!(
                "block {block} has {} bytes at {:#x}, which are not whole pages of {PAGE_BYTES}",
                range.bytes,
                base.unwrap_or(0) + range.offset as u64
            ));
        }
    }
    Ok(())
}

impl GpuSide {
    fn in_place(&self) -> Result<&InPlace> {
        let missing = || {
            Error::new(
                ErrorKind::InvalidArgument,
                "a KV cache cuFile does not know",
            )
        };
        self.in_place.as_ref().ok_or_else(missing)
    }

    /// Puts the hashing of a chunk where it lies on the compute stream; `None` unless more than
    /// `reserve` slots for head and page table are free.
    ///
    /// # Errors
    /// As [`GpuSide::stage_slot`].
    pub(in crate::store) fn stage_in_place(
        &self,
        cache: &CacheShared,
        blocks: &[usize],
        reserve: usize,
        compute: ComputeStream,
    ) -> Result<Option<InPlaceImage>> {
        let plan = TransferPlan::new(&cache.layout, blocks)?;
        let Some(mut slot) = self.in_place()?.slots.try_take(&self.gpu, reserve) else {
            return Ok(None);
        };
        let compute = self.gpu.compute_stream(compute);
        let own = self.gpu.store_stream();
        let used = PAGE_BYTES + cache.format.page_count() * 8;
        let end = PAGE_BYTES + cache.format.table_bytes();
        let staged = slot
            .clear(&compute, used..end)
            .and_then(|()| slot.hash_in_place(&compute, &plan, &cache.regions, Some(PAGE_BYTES)))
            .and_then(|()| slot.mark(&compute))
            .and_then(|()| slot.order_after_mark(own))
            .and_then(|()| slot.fetch_frame(own, PAGE_BYTES))
            .and_then(|()| slot.mark(own));
        match staged {
            Ok(()) => Ok(Some(InPlaceImage { slot, plan })),
            Err(error) => {
                give_up(&mut slot, [&compute, own]);
                Err(error)
            }
        }
    }

    /// Reads a chunk into its blocks and verifies it there.
    ///
    /// # Errors
    /// See [`InPlaceFailure`]; the blocks hold no valid KV then.
    pub(in crate::store) fn load_in_place(
        &self,
        job: &LoadJob,
        slot: &mut GpuSlot,
        file: &Arc<IoFile>,
        deadline: Instant,
    ) -> Result<(), InPlaceFailure> {
        let (cufile, in_place) = (self.cufile()?, self.in_place()?);
        let stream = self.gpu.load_stream();
        let format = &job.cache.format;
        let table = PAGE_BYTES..PAGE_BYTES + format.table_bytes();
        let mut frame = cufile.submit(Operation::Read, file, 0, slot.share(0..PAGE_BYTES)?);
        let table_at = format.table_offset();
        frame.extend(cufile.submit(Operation::Read, file, table_at, slot.share(table)?));
        // cuFile knows no streams: what still uses the blocks must be over.
        job.wait_before(deadline)?;
        let plan =
            TransferPlan::new(&job.cache.layout, &job.blocks).map_err(InPlaceFailure::Over)?;
        let offset = format.payload_offset() + job.payload.start;
        // At the same time as head and table: one way to the disk and back less.
        let payload = in_place.submit(cufile, Operation::Read, file, &plan, offset)?;
        let frame = wait_all(frame, deadline)
            .and_then(|()| slot.fetch_frame(stream, PAGE_BYTES))
            .and_then(|()| slot.mark(stream))
            .and_then(|()| slot.wait(deadline))
            .and_then(|()| slot.frame())
            .and_then(|(head, table)| verify_frame(job, head, table));
        // Also if the frame is bad: the blocks are cuFile's until it has let go of them.
        wait_pieces(payload, deadline)?;
        frame?;
        let pages = job.payload.start / PAGE_BYTES..job.payload.end / PAGE_BYTES;
        slot.hash_in_place(stream, &plan, &job.cache.regions, None)?;
        slot.fetch_hashes(stream, pages.len())?;
        slot.mark(stream)?;
        slot.wait(deadline)?;
        let (head, table) = slot.frame()?;
        verify(job, head, table, &pages, &slot.hashes(pages.len())?)?;
        Ok(())
    }
}

/// Waits for all of them; an error is told only when none of them touches memory any more.
fn wait_pieces(handles: Vec<PieceHandle>, deadline: Instant) -> Result<(), InPlaceFailure> {
    let mut outcome = Ok(());
    let mut hanging = Vec::new();
    for handle in handles {
        match handle.wait(deadline) {
            Some(result) => outcome = outcome.and(result),
            None => match handle.cancel() {
                Some(stage) => outcome = outcome.and(Err(not_begun(stage))),
                None => hanging.push(handle),
            },
        }
    }
    if hanging.is_empty() {
        return outcome.map_err(InPlaceFailure::Over);
    }
    let message = format!(
        "{} cuFile calls on the KV cache do not return",
        hanging.len()
    );
    Err(InPlaceFailure::Hangs(hung(&message), hanging))
}

/// Says why a transfer was given up that has not touched the KV cache.
fn not_begun(stage: Cancelled) -> Error {
    match stage {
        // Others may have hung on another path, so this is one failure of this one and no more.
        Cancelled::Waiting => Error::new(ErrorKind::Gpu, "cuFile had no thread free in time"),
        Cancelled::Taken => hung("cuFileHandleRegister does not return"),
    }
}

/// An error that counts as a call that hangs.
fn hung(message: &str) -> Error {
    let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
    Error::new(ErrorKind::TimedOut, message).with_source(source)
}

impl InPlaceImage {
    /// Returns whether the GPU is not there yet.
    pub(in crate::store) fn is_pending(&self) -> bool {
        self.slot.is_pending()
    }

    /// Writes the chunk to a file. Returns whether its blocks were the same all the while.
    ///
    /// # Errors
    /// As [`GpuSide::load_slot`]; nothing is lost by it.
    pub(in crate::store) fn write(
        &mut self,
        side: &GpuSide,
        cache: &CacheShared,
        chunk: ChunkRef,
        file: &Arc<IoFile>,
        deadline: Instant,
    ) -> Result<bool> {
        let (cufile, in_place) = (side.cufile()?, side.in_place()?);
        let (format, slot) = (&cache.format, &mut self.slot);
        send_head(side, cache, chunk, slot, deadline)?;
        let table = PAGE_BYTES..PAGE_BYTES + format.table_bytes();
        let (start, table_at) = (format.payload_offset(), format.table_offset());
        let mut handles = cufile.submit(Operation::Write, file, 0, slot.share(0..PAGE_BYTES)?);
        handles.extend(cufile.submit(Operation::Write, file, table_at, slot.share(table)?));
        let pieces = in_place.submit(cufile, Operation::Write, file, &self.plan, start)?;
        wait_all(handles, deadline)?;
        wait_pieces(pieces, deadline).map_err(|failure| match failure {
            InPlaceFailure::Over(error) | InPlaceFailure::Hangs(error, _) => error,
        })?;
        let own = side.gpu.store_stream();
        let pages = format.page_count();
        slot.hash_in_place(own, &self.plan, &cache.regions, None)?;
        slot.fetch_hashes(own, pages)?;
        slot.mark(own)?;
        slot.wait(deadline)?;
        Ok(has_hashes(slot.frame()?.1, &slot.hashes(pages)?))
    }

    /// Copies the chunk to a pinned buffer, as long as the file, for POSIX to write; `None` when
    /// its blocks are no longer what they were.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::Gpu`].
    pub(in crate::store) fn into_host(
        mut self,
        side: &GpuSide,
        cache: &CacheShared,
        buffer: StagingRange,
        deadline: Instant,
    ) -> Result<Option<StagedImage>> {
        self.slot.wait(deadline)?;
        let mut slot = side.slots.take(&side.gpu, deadline)?;
        let own = side.gpu.store_stream();
        let gathered = slot
            .gather_chunk(&cache.format, &self.plan, &cache.regions, own, own)
            .and_then(|()| slot.fetch_frame(own, cache.format.table_offset()))
            .and_then(|()| slot.mark(own))
            .and_then(|()| slot.wait(deadline));
        if let Err(error) = gathered {
            drop(slot.settle(own, Instant::now() + GRACE));
            return Err(error);
        }
        if slot.frame()?.1 != self.slot.frame()?.1 {
            return Ok(None);
        }
        side.fetch_image(own, slot, buffer, true).map(Some)
    }
}

/// Returns whether a page table begins with these hashes.
fn has_hashes(table: &[u8], hashes: &[u64]) -> bool {
    let (entries, _) = table.as_chunks::<8>();
    let entries = entries.iter().map(|entry| u64::from_le_bytes(*entry));
    entries.take(hashes.len()).eq(hashes.iter().copied())
}
