//! Which way of copying pieces is the quickest for a KV cache: found out by timing each, page hashes
//! included, since one of the ways makes them as it copies.

use std::time::{Duration, Instant};

use super::{CopyMethod, Gpu, GpuSlots};
use crate::chunk::ChunkFormat;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::Region;

/// Rounds that count; one more comes first, for what is slow only once.
const ROUNDS: usize = 5;
/// The longest that one copy of a chunk may take.
const LIMIT: Duration = Duration::from_secs(5);

/// A way of copying pieces, and how long it took for a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// The way.
    pub method: CopyMethod,
    /// The median time that the stream was held, in milliseconds of the device.
    pub milliseconds: f32,
}

impl Gpu {
    /// Times each way that works on this device with the ranges of `plan`, interleaved, and returns
    /// the GPU with the quickest chosen, and all times in ascending order.
    ///
    /// What is timed is all that a store does inside the GPU, on one stream. Reads the KV cache and
    /// writes to a slot only. The clock is the device's, so what the driver
    /// takes to submit many pieces counts where the stream waits for it, as a forward would.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] or [`ErrorKind::TimedOut`] when a copy does not end well.
    pub fn calibrated(
        &self,
        slots: &GpuSlots,
        plan: &TransferPlan,
        regions: &[Region],
        format: &ChunkFormat,
    ) -> Result<(Self, Vec<Timing>)> {
        let mut times: Vec<(CopyMethod, Vec<f32>)> = self
            .methods()
            .iter()
            .map(|method| (*method, Vec::with_capacity(ROUNDS)))
            .collect();
        for round in 0..=ROUNDS {
            for (method, taken) in &mut times {
                let time = self
                    .forced(*method)
                    .time_gather(slots, plan, regions, format)?;
                if round > 0 {
                    taken.push(time);
                }
            }
        }
        let mut timings: Vec<Timing> = times
            .into_iter()
            .map(|(method, mut taken)| {
                taken.sort_by(f32::total_cmp);
                let milliseconds = taken.get(ROUNDS / 2).copied().unwrap_or(f32::INFINITY);
                Timing {
                    method,
                    milliseconds,
                }
            })
            .collect();
        timings.sort_by(|one, other| one.milliseconds.total_cmp(&other.milliseconds));
        let best = timings.first().map_or(self.method(), |best| best.method);
        Ok((self.forced(best), timings))
    }

    fn time_gather(
        &self,
        slots: &GpuSlots,
        plan: &TransferPlan,
        regions: &[Region],
        format: &ChunkFormat,
    ) -> Result<f32> {
        let deadline = Instant::now() + LIMIT;
        let mut slot = slots.take(self, deadline)?;
        let stream = self.store_stream();
        let failed = |error| Error::gpu("time a copy", error);
        let event = || self.context().timed_event().map_err(failed);
        let (start, end) = (event()?, event()?);
        let record = |event| stream.record(event).map_err(failed);
        record(&start)?;
        let gathered = slot
            .gather_chunk(format, plan, regions, stream, stream)
            .and_then(|()| record(&end))
            .and_then(|()| slot.mark(stream));
        if let Err(error) = gathered {
            drop(slot.settle(stream, deadline));
            return Err(error);
        }
        slot.wait(deadline)?;
        match end.wait(deadline).map_err(failed)? {
            true => end.milliseconds_since(&start).map_err(failed),
            false => Err(Error::new(ErrorKind::TimedOut, "time a copy")),
        }
    }
}
