//! The limit of PCIe: copies between VRAM and pinned memory, as large as a chunk's file, several at
//! a time.

use std::collections::VecDeque;
use std::time::Instant;

use kvrail::chunk::ChunkFormat;
use kvrail::memory::{Gpu, GpuSlot, GpuSlots, HostArena, SlotShape, StagingPool, StagingRange};

use super::super::clients::{self, Sample};
use super::super::submission::WAIT_LIMIT;
use super::kv_memory::GpuKvMemory;
use crate::failure::Failure;

/// Copies under way at a time, as many as kvrail has streams for each direction.
const DEPTH: usize = 4;

/// Which way bytes go over PCIe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From VRAM to the host, as a store does.
    ToHost,
    /// From the host to VRAM, as a load does.
    ToGpu,
}

/// Slots in VRAM and pinned buffers to copy between.
pub(crate) struct PinnedCopy {
    gpu: Gpu,
    slots: GpuSlots,
    buffers: StagingPool,
    file_bytes: usize,
}

impl PinnedCopy {
    /// Allocates and pins the memory.
    pub(crate) fn new(
        gpu: &Gpu,
        memory: &GpuKvMemory,
        blocks_per_chunk: usize,
    ) -> Result<Self, Failure> {
        let layout = memory.layout();
        let format = ChunkFormat::new(layout.payload_shape(blocks_per_chunk))?;
        let file_bytes = format.file_bytes();
        let shape = SlotShape::new(layout, &format, blocks_per_chunk);
        let arena = HostArena::pinned(DEPTH * file_bytes, gpu.context())?;
        Ok(Self {
            gpu: gpu.clone(),
            slots: GpuSlots::new(gpu, shape, DEPTH, DEPTH, None)?,
            buffers: StagingPool::over(arena, file_bytes)?,
            file_bytes,
        })
    }

    /// Copies `count` chunk files.
    pub(crate) fn run(&self, direction: Direction, count: usize) -> Result<Sample, Failure> {
        clients::time(|| {
            let mut under_way: VecDeque<(GpuSlot, StagingRange)> = VecDeque::new();
            for _ in 0..count {
                let (mut slot, mut buffer) = match under_way.len() {
                    DEPTH.. => wait_for_first(&mut under_way)?,
                    _ => (
                        self.slots.take(&self.gpu, deadline())?,
                        self.buffers.take(deadline())?,
                    ),
                };
                let whole = 0..self.file_bytes;
                let stream = match direction {
                    Direction::ToHost => {
                        let stream = self.gpu.store_stream();
                        slot.fetch(stream, whole, &mut buffer)?;
                        stream
                    }
                    Direction::ToGpu => {
                        let stream = self.gpu.load_stream();
                        slot.send(stream, &buffer, whole)?;
                        stream
                    }
                };
                slot.mark(stream)?;
                under_way.push_back((slot, buffer));
            }
            while !under_way.is_empty() {
                wait_for_first(&mut under_way)?;
            }
            Ok(())
        })
    }
}

fn wait_for_first(
    under_way: &mut VecDeque<(GpuSlot, StagingRange)>,
) -> Result<(GpuSlot, StagingRange), Failure> {
    let first = under_way.pop_front();
    let (mut slot, buffer) = first.ok_or_else(|| Failure::new("no copy is under way"))?;
    slot.wait(deadline())?;
    Ok((slot, buffer))
}

fn deadline() -> Instant {
    Instant::now() + WAIT_LIMIT
}
