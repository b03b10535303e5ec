//! Copies that hash on the way: gather and page hashes, or page hashes and scatter, in one pass.
//!
//! Apart, a byte is read once to be copied and once more to be hashed, and a load asks the CPU in
//! between whether the hashes are right. Together it is read once, and the GPU compares itself: a
//! page whose hash is not that of the page table is not copied anywhere.
#![expect(
    unsafe_code,
    reason = "hands addresses of KV cache and slot to the kernels"
)]

use kvrail_cuda::{DevicePointer, Pages, Stream};

use super::slot::{DESCRIPTOR_BYTES, GpuSlot};
use super::transfer::{Piece, outside, pieces, put_descriptor, send_descriptors, sized, to_host};
use super::{CopyMethod, Gpu};
use crate::chunk::{ChunkFormat, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::Region;

/// What the kernels access at once, so what addresses and lengths of pieces are multiples of.
const ALIGNMENT: u64 = 16;
/// What the place for the number of a bad page holds at first: no page.
const NO_PAGE: u64 = u64::MAX;

/// Where in a slot's image the payload of a load lies, whose frame was found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagesInSlot {
    /// Where the first page begins.
    pub start: usize,
    /// Number of pages.
    pub count: usize,
    /// Where the expected hash of the first page lies.
    pub expected: usize,
    /// Where what is wanted begins, in the first page.
    pub payload: usize,
}

impl GpuSlot {
    /// Puts the way of a chunk to the image on two streams: what must see the KV cache as it is now
    /// on `compute`, the rest on `own`, behind it. Payload and page table are there afterwards, with
    /// zeros behind both; the table is not where the GPU has no kernels to hash with.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when plan, regions and slot do not belong together,
    /// [`ErrorKind::Gpu`] when the driver refuses.
    pub fn gather_chunk(
        &mut self,
        format: &ChunkFormat,
        plan: &TransferPlan,
        regions: &[Region],
        compute: &Stream,
        own: &Stream,
    ) -> Result<()> {
        let hashed = self.gather_hashed(format, plan, regions, compute)?;
        if !hashed {
            let start = format.payload_offset();
            let end = start + format.payload_bytes();
            let table = format.table_offset();
            let zeros = [
                end..end + format.pad_bytes(),
                table + format.page_count() * 8..table + format.table_bytes(),
            ];
            self.gather(compute, plan, regions, start, &zeros)?;
        }
        self.mark(compute)?;
        self.order_after_mark(own)?;
        if !hashed && self.gpu.kernels().is_some() {
            let table = format.table_offset();
            self.hash_pages(
                own,
                format.payload_offset(),
                format.page_count(),
                Some(table),
            )?;
        }
        Ok(())
    }

    /// Gathers and hashes in one launch; returns whether it did, which needs the method
    /// [`CopyMethod::HashingKernel`] and pieces of whole 16 bytes.
    fn gather_hashed(
        &mut self,
        format: &ChunkFormat,
        plan: &TransferPlan,
        regions: &[Region],
        stream: &Stream,
    ) -> Result<bool> {
        let start = format.payload_offset();
        let pages = format.page_count();
        let address = self.image_span(start..start + pages * PAGE_BYTES)?;
        let table = format.table_offset();
        let hashes = self.image_span(table..table + format.table_bytes())?;
        let Some(mut list) = self.hashing_pieces(plan, regions, address, true)? else {
            return Ok(false);
        };
        if format.pad_bytes() > 0 {
            list.push(Piece {
                source: 0,
                target: address + format.payload_bytes() as u64,
                bytes: format.pad_bytes(),
            });
        }
        let descriptors = self.send_pieces(stream, &list)?;
        let pages = Pages {
            address,
            count: pages,
            hashes,
        };
        let gpu = self.gpu.clone();
        let entries = format.table_bytes() / 8;
        // SAFETY: the pieces lie in the KV cache's regions and fill the pages of this slot, as the
        // spans and the plan say; all stay until the stream is past the mark that the caller sets.
        let launched = unsafe {
            kernels(&gpu)?.gather_hashed(stream, descriptors, list.len(), pages, entries)
        };
        launched.map_err(|error| Error::gpu("gather and hash a chunk", error))?;
        Ok(true)
    }

    /// Puts the way of verified pages to the ranges of `plan` on a stream, and the number of the
    /// first page that is not what it should be to pinned memory (see [`GpuSlot::bad_page`]).
    /// Returns whether it did, as [`GpuSlot::gather_chunk`] where it hashes on the way.
    ///
    /// # Errors
    /// As [`GpuSlot::gather`].
    pub fn scatter_verified(
        &mut self,
        stream: &Stream,
        plan: &TransferPlan,
        regions: &[Region],
        pages: PagesInSlot,
    ) -> Result<bool> {
        let end = pages.start + pages.count * PAGE_BYTES;
        let address = self.image_span(pages.start..end)?;
        let hashes = self.image_span(pages.expected..pages.expected + pages.count * 8)?;
        let source = self.image_span(pages.payload..pages.payload + plan.bytes())?;
        if pages.payload < pages.start || pages.payload + plan.bytes() > end {
            return Err(outside("pages of a load", pages.payload + plan.bytes()));
        }
        let Some(list) = self.hashing_pieces(plan, regions, source, false)? else {
            return Ok(false);
        };
        let descriptors = self.send_pieces(stream, &list)?;
        let bad = descriptors + (list.len() * DESCRIPTOR_BYTES) as u64;
        let pages = Pages {
            address,
            count: pages.count,
            hashes,
        };
        let gpu = self.gpu.clone();
        // SAFETY: as in `gather_hashed`; the word behind the descriptors was sent with them.
        let launched =
            unsafe { kernels(&gpu)?.scatter_verified(stream, descriptors, list.len(), pages, bad) };
        launched.map_err(|error| Error::gpu("verify and scatter a chunk", error))?;
        let host = &mut self.parts_mut()?.host;
        to_host(stream, sized(host.hashes.as_mut_slice(), 8)?, bad)?;
        Ok(true)
    }

    /// Returns the number of the first bad page that [`GpuSlot::scatter_verified`] met, counted from
    /// its first page, once the slot was waited for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a slot taken apart.
    pub fn bad_page(&self) -> Result<Option<usize>> {
        let [page] = self.hashes(1)?[..] else {
            return Err(outside("bad page", 8));
        };
        Ok((page != NO_PAGE).then(|| usize::try_from(page).unwrap_or(usize::MAX)))
    }

    /// Returns the pieces for a kernel that hashes, in ascending order on the side of the pages;
    /// `None` where it is not the method, or does not take such pieces.
    fn hashing_pieces(
        &self,
        plan: &TransferPlan,
        regions: &[Region],
        image: DevicePointer,
        gather: bool,
    ) -> Result<Option<Vec<Piece>>> {
        if self.gpu.method() != CopyMethod::HashingKernel {
            return Ok(None);
        }
        let list = pieces(plan, regions, image, gather, usize::MAX)?;
        let is_aligned = |piece: &Piece| {
            (piece.source | piece.target | piece.bytes as u64).is_multiple_of(ALIGNMENT)
                && piece.bytes > 0
        };
        Ok((!list.is_empty() && list.iter().all(is_aligned)).then_some(list))
    }

    /// Copies the descriptors of pieces to VRAM, and a word behind them that names no page.
    fn send_pieces(&mut self, stream: &Stream, list: &[Piece]) -> Result<DevicePointer> {
        let parts = self.parts_mut()?;
        let mut end = 0;
        for piece in list {
            put_descriptor(parts, end, [piece.source, piece.target, piece.bytes as u64])?;
            end += DESCRIPTOR_BYTES;
        }
        let word = parts.host.descriptors.as_mut_slice().get_mut(end..end + 8);
        let word = word.ok_or_else(|| outside("descriptors", end + 8))?;
        word.copy_from_slice(&NO_PAGE.to_ne_bytes());
        send_descriptors(stream, parts, 0..end + 8)
    }
}

fn kernels(gpu: &Gpu) -> Result<&kvrail_cuda::Kernels> {
    let missing = || {
        Error::new(
            ErrorKind::InvalidArgument,
            "hashing on a GPU without kernels",
        )
    };
    gpu.kernels().ok_or_else(missing)
}
