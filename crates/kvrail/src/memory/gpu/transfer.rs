//! What a GPU does with a slot, put on a stream: gather, copy to and from the host, scatter.
#![expect(
    unsafe_code,
    reason = "hands addresses of KV cache, slot and pinned memory to the GPU"
)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kvrail_cuda::{COPY_PIECE_BYTES, DevicePointer, Stream};

use super::CopyMethod;
use super::slot::{DESCRIPTOR_BYTES, GpuSlot, Parts};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::{Region, StagingRange};

/// One copy inside a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) source: DevicePointer,
    pub(super) target: DevicePointer,
    pub(super) bytes: usize,
}

impl GpuSlot {
    /// Copies the ranges of `plan` to `at` of the image, in payload order, and `zeros` behind them
    /// (bytes of the image that the file has as padding).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when plan, regions and slot do not belong together,
    /// [`ErrorKind::Gpu`] when the driver refuses.
    pub fn gather(
        &mut self,
        stream: &Stream,
        plan: &TransferPlan,
        regions: &[Region],
        at: usize,
        zeros: &[Range<usize>],
    ) -> Result<()> {
        let image = self.image_span(at..at + plan.bytes())?;
        let mut pieces = pieces(
            plan,
            regions,
            image,
            true,
            piece_bytes(self.gpu.method_on(stream)),
        )?;
        for range in zeros.iter().filter(|range| !range.is_empty()) {
            let target = self.image_span(range.clone())?;
            let source = self.clear_page(stream, range.len())?;
            pieces.push(Piece {
                source,
                target,
                bytes: range.len(),
            });
        }
        self.copy_pieces(stream, &pieces)
    }

    /// Copies the image from `at` on to the ranges of `plan`, in payload order.
    ///
    /// # Errors
    /// As [`GpuSlot::gather`].
    pub fn scatter(
        &mut self,
        stream: &Stream,
        plan: &TransferPlan,
        regions: &[Region],
        at: usize,
    ) -> Result<()> {
        let image = self.image_span(at..at + plan.bytes())?;
        let pieces = pieces(
            plan,
            regions,
            image,
            false,
            piece_bytes(self.gpu.method_on(stream)),
        )?;
        self.copy_pieces(stream, &pieces)
    }

    /// Clears a range of the image, less than a page.
    ///
    /// # Errors
    /// As [`GpuSlot::gather`].
    pub fn clear(&mut self, stream: &Stream, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let target = self.image_span(range.clone())?;
        let piece = Piece {
            source: self.clear_page(stream, range.len())?,
            target,
            bytes: range.len(),
        };
        self.copy_pieces(stream, &[piece])
    }

    /// Copies a range of the image to the start of `target`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range outside either, [`ErrorKind::Gpu`].
    pub fn fetch(
        &mut self,
        stream: &Stream,
        range: Range<usize>,
        target: &mut StagingRange,
    ) -> Result<()> {
        let source = self.image_span(range.clone())?;
        let target = sized(target.as_mut_slice(), range.len())?;
        self.unmarked = true;
        to_host(stream, target, source)
    }

    /// Copies the start of `source` to a range of the image.
    ///
    /// # Errors
    /// As [`GpuSlot::fetch`].
    pub fn send(
        &mut self,
        stream: &Stream,
        source: &StagingRange,
        range: Range<usize>,
    ) -> Result<()> {
        let target = self.image_span(range.clone())?;
        let source = source.as_slice().get(..range.len());
        let source = source.ok_or_else(|| outside("pinned memory", range.len()))?;
        self.unmarked = true;
        to_device(stream, target, source)
    }

    /// Marks the end of the work put on `stream` so far.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`].
    pub fn mark(&mut self, stream: &Stream) -> Result<()> {
        self.busy = Some(Arc::new(self.gpu.mark(stream)?));
        self.unmarked = false;
        Ok(())
    }

    /// Makes `stream` wait for the last mark.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`].
    pub fn order_after_mark(&self, stream: &Stream) -> Result<()> {
        match &self.busy {
            Some(event) => stream
                .wait_for(event)
                .map_err(|error| Error::gpu("order streams", error)),
            None => Ok(()),
        }
    }

    /// Waits until the GPU has passed the last mark.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at the deadline, [`ErrorKind::Gpu`] when the work failed.
    pub fn wait(&mut self, deadline: Instant) -> Result<()> {
        let Some(event) = &self.busy else {
            return Ok(());
        };
        match event.wait(deadline) {
            Ok(true) => {
                self.busy = None;
                Ok(())
            }
            Ok(false) => Err(Error::new(
                ErrorKind::TimedOut,
                "the GPU did not finish a copy in time",
            )),
            Err(error) => Err(Error::gpu("wait for the GPU", error)),
        }
    }

    /// Waits, after an error, for whatever was put on `stream`.
    ///
    /// If that fails, what the slot copies from and to may not be used again, and the slot itself
    /// when the GPU is known to be through, or never.
    ///
    /// # Errors
    /// As [`GpuSlot::wait`].
    pub fn settle(&mut self, stream: &Stream, deadline: Instant) -> Result<()> {
        let marked = self.mark(stream);
        self.unmarked |= marked.is_err();
        marked.and_then(|()| self.wait(deadline))
    }

    /// As [`GpuSlot::settle`], for what was put on two streams: `last` waits for `first`, so that one
    /// mark stands for both.
    ///
    /// # Errors
    /// As [`GpuSlot::wait`].
    pub fn settle_both(&mut self, first: &Stream, last: &Stream, deadline: Instant) -> Result<()> {
        let marked = self
            .mark(first)
            .and_then(|()| self.order_after_mark(last))
            .and_then(|()| self.mark(last));
        self.unmarked |= marked.is_err();
        marked.and_then(|()| self.wait(deadline))
    }

    pub(super) fn parts(&self) -> Result<&Parts> {
        self.parts.as_ref().ok_or_else(|| outside("slot", 0))
    }

    /// Returns the parts for work on a stream, which needs a mark behind it.
    pub(super) fn parts_mut(&mut self) -> Result<&mut Parts> {
        self.unmarked = true;
        self.parts.as_mut().ok_or_else(|| outside("slot", 0))
    }

    /// Returns the address of a range of the image.
    pub(super) fn image_span(&self, range: Range<usize>) -> Result<DevicePointer> {
        let image = &self.parts()?.device.image;
        if range.start <= range.end && range.end <= image.len() {
            return Ok(image.address() + range.start as u64);
        }
        Err(outside("image", range.end))
    }

    /// Returns the address of `bytes` zero bytes in VRAM (less than a page), in stream order.
    fn clear_page(&mut self, stream: &Stream, bytes: usize) -> Result<DevicePointer> {
        let parts = self.parts_mut()?;
        if bytes > PAGE_BYTES || bytes > parts.device.hashes.len() {
            return Err(outside("zero page", bytes));
        }
        let page = parts.host.zeros.as_mut_slice();
        // The hashes' memory is free until a load hashes its pages.
        let target = parts.device.hashes.address();
        to_device(stream, target, sized(page, bytes)?)?;
        Ok(target)
    }

    /// Copies pieces inside the GPU.
    fn copy_pieces(&mut self, stream: &Stream, pieces: &[Piece]) -> Result<()> {
        let gpu = self.gpu.clone();
        self.unmarked = true;
        let failed = |error| Error::gpu("copy between KV cache and staging memory", error);
        match (gpu.method_on(stream), gpu.kernels()) {
            (CopyMethod::HashingKernel | CopyMethod::Kernel, Some(kernels)) => {
                let parts = self.parts_mut()?;
                let mut end = 0;
                for piece in pieces {
                    put_descriptor(parts, end, [piece.source, piece.target, piece.bytes as u64])?;
                    end += DESCRIPTOR_BYTES;
                }
                let descriptors = send_descriptors(stream, parts, 0..end)?;
                // SAFETY: each piece lies in the KV cache's regions or in this slot, as the spans
                // checked; both stay until the stream is past the mark that the caller sets.
                unsafe { kernels.copy(stream, descriptors, pieces.len()) }.map_err(failed)
            }
            (CopyMethod::Batch, _) => {
                let targets: Vec<u64> = pieces.iter().map(|piece| piece.target).collect();
                let sources: Vec<u64> = pieces.iter().map(|piece| piece.source).collect();
                let bytes: Vec<usize> = pieces.iter().map(|piece| piece.bytes).collect();
                // SAFETY: as above.
                unsafe { stream.copy_batch(&targets, &sources, &bytes) }.map_err(failed)
            }
            _ => pieces.iter().try_for_each(|piece| {
                // SAFETY: as above.
                unsafe { stream.copy_on_device(piece.target, piece.source, piece.bytes) }
                    .map_err(failed)
            }),
        }
    }
}

/// Returns how many bytes one copy may have.
fn piece_bytes(method: CopyMethod) -> usize {
    match method {
        CopyMethod::HashingKernel | CopyMethod::Kernel => COPY_PIECE_BYTES,
        CopyMethod::Batch | CopyMethod::Pieces => usize::MAX,
    }
}

/// Returns the copies between the ranges of a plan and `image`.
pub(super) fn pieces(
    plan: &TransferPlan,
    regions: &[Region],
    image: DevicePointer,
    gather: bool,
    piece_bytes: usize,
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(plan.ranges().len());
    let mut at = image;
    for range in plan.ranges() {
        let region = regions.get(range.region);
        let region = region.ok_or_else(|| outside("region", range.region))?;
        let start = region.device_span(range.offset, range.bytes)?;
        for done in (0..range.bytes).step_by(piece_bytes) {
            let bytes = (range.bytes - done).min(piece_bytes);
            let memory = start + done as u64;
            let (source, target) = if gather { (memory, at) } else { (at, memory) };
            pieces.push(Piece {
                source,
                target,
                bytes,
            });
            at += bytes as u64;
        }
    }
    Ok(pieces)
}

/// Writes a descriptor into the pinned memory of a slot.
pub(super) fn put_descriptor(parts: &mut Parts, at: usize, words: [u64; 3]) -> Result<()> {
    let target = parts
        .host
        .descriptors
        .as_mut_slice()
        .get_mut(at..at + DESCRIPTOR_BYTES);
    let target = target.ok_or_else(|| outside("descriptors", at))?;
    for (bytes, word) in target.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(())
}

/// Copies descriptors to their place in VRAM and returns its address.
pub(super) fn send_descriptors(
    stream: &Stream,
    parts: &Parts,
    range: Range<usize>,
) -> Result<DevicePointer> {
    let target = parts.device.descriptors.address() + range.start as u64;
    let source = parts.host.descriptors.as_slice().get(range);
    to_device(
        stream,
        target,
        source.ok_or_else(|| outside("descriptors", 0))?,
    )?;
    Ok(target)
}

pub(super) fn to_host(stream: &Stream, target: &mut [u8], source: DevicePointer) -> Result<()> {
    // SAFETY: `target` is pinned memory of a slot or of a staging range on loan: it stays until
    // the GPU is past the mark that follows, and nobody reads it before that mark is done.
    unsafe { stream.copy_to_host(target.as_mut_ptr(), source, target.len()) }
        .map_err(|error| Error::gpu("copy from the GPU", error))
}

pub(super) fn to_device(stream: &Stream, target: DevicePointer, source: &[u8]) -> Result<()> {
    // SAFETY: as in `to_host`; nobody writes to it before the mark is done.
    unsafe { stream.copy_to_device(target, source.as_ptr(), source.len()) }
        .map_err(|error| Error::gpu("copy to the GPU", error))
}

pub(super) fn sized(bytes: &mut [u8], count: usize) -> Result<&mut [u8]> {
    bytes
        .get_mut(..count)
        .ok_or_else(|| outside("pinned memory", count))
}

pub(super) fn outside(what: &str, end: usize) -> Error {
    let message = format!("{what} of a VRAM slot: {end} is outside");
    Error::new(ErrorKind::InvalidArgument, message)
}
