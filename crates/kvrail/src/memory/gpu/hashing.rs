//! Copies that hash on the way: gather and page hashes, or page hashes and scatter, in one pass.
//!
//! Apart, a byte is read once to be copied and once more to be hashed, and a load asks the CPU in
//! between whether the hashes are right. Together it is read once, and the GPU compares itself: a
//! page whose hash is not that of the page table is not copied anywhere.
//!
//! Where the layout is a regular one, as vLLM's are, a launch carries all it needs to know. Else the
//! pieces are described one by one, in a list that is copied to the GPU before each launch.
#![expect(
    unsafe_code,
    reason = "hands addresses of KV cache and slot to the kernels"
)]

use kvrail_cuda::{DevicePointer, Pages, PieceGrid, Stream};

use super::slot::{DESCRIPTOR_BYTES, GpuSlot};
use super::transfer::{Piece, outside, pieces, put_descriptor, send_descriptors, sized};
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
        if !own.is_same(compute) {
            self.order_after_mark(own)?;
        }
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
        if self.gpu.method() != CopyMethod::HashingKernel {
            return Ok(false);
        }
        let start = format.payload_offset();
        let count = format.page_count();
        let address = self.image_span(start..start + count * PAGE_BYTES)?;
        let table = format.table_offset();
        let hashes = self.image_span(table..table + format.table_bytes())?;
        let pages = Pages {
            address,
            count,
            hashes,
        };
        let entries = format.table_bytes() / 8;
        let gpu = self.gpu.clone();
        let launched = if let Some(grid) = grid(plan, regions, 0)? {
            self.unmarked = true;
            // SAFETY: the pieces lie in the KV cache's regions, which stay until the stream is past
            // the mark that the caller sets; as does this slot, which has pages and table.
            unsafe { kernels(&gpu)?.gather_grid(stream, &grid, pages, entries) }
        } else {
            let Some(mut list) = aligned_pieces(plan, regions, address, true)? else {
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
            // SAFETY: as above; the pieces fill the pages, as the spans and the plan say.
            unsafe { kernels(&gpu)?.gather_hashed(stream, descriptors, list.len(), pages, entries) }
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
        if self.gpu.method() != CopyMethod::HashingKernel {
            return Ok(false);
        }
        let skipped = pages.payload - pages.start;
        let pages = Pages {
            address,
            count: pages.count,
            hashes,
        };
        let gpu = self.gpu.clone();
        let launched = if let Some(grid) = grid(plan, regions, skipped)? {
            let bad = self.expect_no_bad_page()?;
            // SAFETY: as in `gather_hashed`; the word is pinned memory beside this slot.
            unsafe { kernels(&gpu)?.scatter_grid(stream, &grid, pages, bad) }
        } else {
            let Some(list) = aligned_pieces(plan, regions, source, false)? else {
                return Ok(false);
            };
            let descriptors = self.send_pieces(stream, &list)?;
            let bad = self.expect_no_bad_page()?;
            // SAFETY: as above.
            unsafe { kernels(&gpu)?.scatter_verified(stream, descriptors, list.len(), pages, bad) }
        };
        launched.map_err(|error| Error::gpu("verify and scatter a chunk", error))?;
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

    /// Says that no page was found bad, in pinned memory beside the slot, and returns the address of
    /// the word, where a kernel says otherwise. A kernel writes there over PCIe, but never for a
    /// chunk that is as it should be; a copy of the word in each direction would be in the way of
    /// every chunk.
    fn expect_no_bad_page(&mut self) -> Result<DevicePointer> {
        let hashes = &mut self.parts_mut()?.host.hashes;
        let address = hashes.device_address();
        sized(hashes.as_mut_slice(), 8)?.copy_from_slice(&NO_PAGE.to_ne_bytes());
        address.ok_or_else(|| outside("pinned memory", 8))
    }

    /// Copies the descriptors of pieces to VRAM.
    fn send_pieces(&mut self, stream: &Stream, list: &[Piece]) -> Result<DevicePointer> {
        let parts = self.parts_mut()?;
        let mut end = 0;
        for piece in list {
            put_descriptor(parts, end, [piece.source, piece.target, piece.bytes as u64])?;
            end += DESCRIPTOR_BYTES;
        }
        send_descriptors(stream, parts, 0..end)
    }
}

/// Returns the pieces of a plan as a grid, `skipped` bytes behind the start of the first page; `None`
/// where they are none, or not one that a launch can carry.
fn grid(plan: &TransferPlan, regions: &[Region], skipped: usize) -> Result<Option<PieceGrid>> {
    let Some((regular, firsts)) = plan.regular() else {
        return Ok(None);
    };
    let extent = regular.pieces.saturating_sub(1) * regular.stride + regular.bytes;
    let mut rows = Vec::with_capacity(firsts.len());
    for first in firsts {
        let region = regions.get(first.region);
        let region = region.ok_or_else(|| outside("region", first.region))?;
        rows.push(region.device_span(first.offset, extent)?);
    }
    let (stride, bytes) = (regular.stride as u64, regular.bytes);
    Ok(PieceGrid::new(
        &rows,
        regular.pieces,
        stride,
        bytes,
        skipped,
    ))
}

/// Returns the pieces of a plan one by one, in ascending order on the side of the pages; `None` where
/// a kernel that hashes does not take them.
fn aligned_pieces(
    plan: &TransferPlan,
    regions: &[Region],
    image: DevicePointer,
    gather: bool,
) -> Result<Option<Vec<Piece>>> {
    let list = pieces(plan, regions, image, gather, usize::MAX)?;
    let is_aligned = |piece: &Piece| {
        (piece.source | piece.target | piece.bytes as u64).is_multiple_of(ALIGNMENT)
            && piece.bytes > 0
    };
    Ok((!list.is_empty() && list.iter().all(is_aligned)).then_some(list))
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
