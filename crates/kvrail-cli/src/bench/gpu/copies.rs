//! What the GPU does inside its own memory for a chunk, against one plain copy of the same bytes.
//!
//! Timed by events on the GPU. The stream is kept busy with copies to the host while the work is
//! put on it, so that the time is the GPU's and not that of the calls; where the calls take longer
//! than that (a copy for each piece), `calls_waited_for` says so.

use std::time::Instant;

use kvrail::chunk::ChunkFormat;
use kvrail::layout::TransferPlan;
use kvrail::memory::{
    CopyMethod, Gpu, GpuSlot, GpuSlots, HostArena, PagesInSlot, SlotShape, StagingPool,
    StagingRange,
};
use kvrail::{Error, Region};
use kvrail_cuda::{Event, Stream};

use super::super::submission::WAIT_LIMIT;
use super::kv_memory::GpuKvMemory;
use crate::failure::Failure;

/// Chunks between two events: enough that the resolution of events, half a microsecond, is small
/// beside what they take.
const CHUNKS: usize = 8;
/// Copies to the host that keep the stream busy meanwhile: at first, and at most.
const BUSY_COPIES: (usize, usize) = (2, 64);

/// One piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// The payload from one slot to another, in one piece.
    Plain,
    /// From scattered blocks to a slot: what holds the compute stream.
    Gather,
    /// The same, and the hashes of its pages: all that a store does inside the GPU.
    GatherHash,
    /// From a slot to scattered blocks.
    Scatter,
    /// Page hashes, compared on the GPU or brought to the host for that, and scatter: all that a load
    /// does inside the GPU.
    ScatterVerify,
}

impl Work {
    /// Everything that is compared with [`Work::Plain`].
    pub(crate) const ALL: [Self; 4] = [
        Self::Gather,
        Self::GatherHash,
        Self::Scatter,
        Self::ScatterVerify,
    ];

    /// Returns the name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain copy",
            Self::Gather => "gather",
            Self::GatherHash => "gather + hash",
            Self::Scatter => "scatter",
            Self::ScatterVerify => "scatter + verify",
        }
    }

    /// Returns whether `method` has a way of its own to do this.
    pub(crate) fn is_by(self, method: CopyMethod) -> bool {
        self == Self::Plain || self.hashes() || method != CopyMethod::HashingKernel
    }

    /// Returns whether kernels are needed.
    pub(crate) fn hashes(self) -> bool {
        matches!(self, Self::GatherHash | Self::ScatterVerify)
    }
}

/// What one piece of work took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Timing {
    /// Milliseconds of GPU time for each chunk.
    pub(crate) milliseconds: f64,
    /// Whether the GPU was through with what kept it busy before all work was put on the stream.
    pub(crate) calls_waited_for: bool,
}

/// Slots and plans of chunks, used again for each measurement.
pub(crate) struct Copies {
    gpu: Gpu,
    slots: GpuSlots,
    host: StagingPool,
    regions: Vec<Region>,
    gathers: Vec<TransferPlan>,
    scatters: Vec<TransferPlan>,
    format: ChunkFormat,
}

/// What one measurement works on.
struct Taken {
    slots: Vec<GpuSlot>,
    /// The source of the copies that keep the stream busy.
    busy: GpuSlot,
    host: StagingRange,
    /// How their pieces are copied.
    method: CopyMethod,
}

impl Copies {
    /// Allocates the slots.
    pub(crate) fn new(
        gpu: &Gpu,
        memory: &GpuKvMemory,
        blocks_per_chunk: usize,
    ) -> Result<Self, Failure> {
        let layout = memory.layout();
        let format = ChunkFormat::new(layout.payload_shape(blocks_per_chunk))?;
        let shape = SlotShape::new(layout, &format, blocks_per_chunk);
        let plan = |blocks: Vec<usize>| TransferPlan::new(layout, &blocks);
        let slots = || (0..CHUNKS).map(|index| index % memory.slots());
        let arena = HostArena::pinned(format.file_bytes(), gpu.context())?;
        Ok(Self {
            gpu: gpu.clone(),
            // One more for the copies that keep the stream busy.
            slots: GpuSlots::new(gpu, shape, CHUNKS + 1, CHUNKS + 1, None)?,
            host: StagingPool::over(arena, format.file_bytes())?,
            regions: vec![memory.region()],
            gathers: slots()
                .map(|slot| plan(memory.source_blocks(slot)))
                .collect::<Result<_, Error>>()?,
            scatters: slots()
                .map(|slot| plan(memory.target_blocks(slot)))
                .collect::<Result<_, Error>>()?,
            format,
        })
    }

    /// Returns the format of the chunks.
    pub(crate) fn format(&self) -> &ChunkFormat {
        &self.format
    }

    /// Returns the bytes that each piece of work moves for a chunk.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.format.payload_bytes()
    }

    /// Times `work`, with pieces copied by `method`.
    pub(crate) fn time(&self, work: Work, method: CopyMethod) -> Result<Timing, Failure> {
        let gpu = self.gpu.with_method(method)?;
        let (mut busy_copies, most) = BUSY_COPIES;
        loop {
            let timing = self.time_once(work, &gpu, busy_copies)?;
            if !timing.calls_waited_for || busy_copies == most {
                return Ok(timing);
            }
            busy_copies *= 2;
        }
    }

    fn time_once(&self, work: Work, gpu: &Gpu, busy_copies: usize) -> Result<Timing, Failure> {
        let deadline = Instant::now() + WAIT_LIMIT;
        let take = || self.slots.take(gpu, deadline);
        let mut taken = Taken {
            slots: (0..CHUNKS).map(|_| take()).collect::<Result<_, _>>()?,
            busy: take()?,
            host: self.host.take(deadline)?,
            method: gpu.method(),
        };
        let stream = gpu.store_stream();
        let outcome = self.put(work, stream, busy_copies, &mut taken, deadline);
        // Whatever came of it, nothing is given back while the GPU works on it.
        let mut settled = Ok(());
        for slot in taken.slots.iter_mut().chain([&mut taken.busy]) {
            settled = settled.and(slot.settle(stream, deadline));
        }
        let (start, end, calls_waited_for) = outcome?;
        settled?;
        if work == Work::ScatterVerify && gpu.hashes_on_the_way() {
            for (index, slot) in taken.slots.iter().enumerate() {
                if let Some(page) = slot.bad_page()? {
                    let message = format!("chunk {index}: the GPU finds page {page} bad");
                    return Err(Failure::new(message).damaged());
                }
            }
        }
        let milliseconds = end.milliseconds_since(&start).map_err(gpu_failure)?;
        Ok(Timing {
            milliseconds: f64::from(milliseconds) / CHUNKS as f64,
            calls_waited_for,
        })
    }

    /// Puts the work on a stream between two events; returns them, and whether the first was
    /// passed before the second was put there.
    fn put(
        &self,
        work: Work,
        stream: &Stream,
        busy_copies: usize,
        taken: &mut Taken,
        deadline: Instant,
    ) -> Result<(Event, Event, bool), Failure> {
        let event = || stream.context().timed_event().map_err(gpu_failure);
        let (start, end) = (event()?, event()?);
        let whole = 0..self.format.file_bytes();
        if work == Work::ScatterVerify {
            // Pages that are not what their page table says would not be copied.
            for (slot, plan) in taken.slots.iter_mut().zip(&self.gathers) {
                slot.gather_chunk(&self.format, plan, &self.regions, stream, stream)?;
                slot.mark(stream)?;
                // The descriptors of what follows take the place of these.
                slot.wait(deadline)?;
            }
        }
        for _ in 0..busy_copies {
            taken.busy.fetch(stream, whole.clone(), &mut taken.host)?;
        }
        stream.record(&start).map_err(gpu_failure)?;
        for index in 0..CHUNKS {
            self.put_chunk((work, taken.method), stream, &mut taken.slots, index)?;
        }
        stream.record(&end).map_err(gpu_failure)?;
        let calls_waited_for = start.is_done().map_err(gpu_failure)?;
        Ok((start, end, calls_waited_for))
    }

    fn put_chunk(
        &self,
        (work, method): (Work, CopyMethod),
        stream: &Stream,
        slots: &mut [GpuSlot],
        index: usize,
    ) -> Result<(), Failure> {
        let missing = || Failure::new(format!("no slot {index}"));
        if work == Work::Plain {
            let (to, from) = slots.split_at_mut(index.max(1));
            let (to, from) = match index {
                0 => (to.first_mut(), from.last_mut()),
                _ => (to.last_mut(), from.first_mut()),
            };
            let (to, from) = (to.ok_or_else(missing)?, from.ok_or_else(missing)?);
            return Ok(to.copy_image(stream, from, self.payload_bytes())?);
        }
        let slot = slots.get_mut(index).ok_or_else(missing)?;
        let (start, pages) = (self.format.payload_offset(), self.format.page_count());
        let table = self.format.table_offset();
        match work {
            Work::Plain => {}
            Work::Gather => {
                let plan = self.gathers.get(index).ok_or_else(missing)?;
                slot.gather(stream, plan, &self.regions, start, &[])?;
            }
            Work::GatherHash => {
                let plan = self.gathers.get(index).ok_or_else(missing)?;
                slot.gather_chunk(&self.format, plan, &self.regions, stream, stream)?;
            }
            Work::Scatter => {
                let plan = self.scatters.get(index).ok_or_else(missing)?;
                slot.scatter(stream, plan, &self.regions, start)?;
            }
            Work::ScatterVerify => {
                let plan = self.scatters.get(index).ok_or_else(missing)?;
                let place = PagesInSlot {
                    start,
                    count: pages,
                    expected: table,
                    payload: start,
                };
                if !slot.scatter_verified(stream, plan, &self.regions, place)? {
                    if method == CopyMethod::HashingKernel {
                        let message = format!("{method}: not for blocks of no whole 16 bytes");
                        return Err(Failure::new(message));
                    }
                    slot.hash_pages(stream, start, pages, None)?;
                    slot.fetch_hashes(stream, pages)?;
                    slot.scatter(stream, plan, &self.regions, start)?;
                }
            }
        }
        Ok(())
    }
}

fn gpu_failure(error: kvrail_cuda::Error) -> Failure {
    Failure::new(format!("time work on the GPU: {error}"))
}
