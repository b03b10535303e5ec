//! Hashing pages on the GPU: in the image of a slot, or where they lie in the KV cache.
#![expect(
    unsafe_code,
    reason = "hands addresses of KV cache and slot to the hash kernel"
)]

use kvrail_cuda::{DevicePointer, Stream};

use super::slot::{DESCRIPTOR_BYTES, GpuSlot};
use super::transfer::{outside, put_descriptor, send_descriptors, sized, to_host};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::Region;

impl GpuSlot {
    /// Hashes `pages` pages of the image from `at` on; the hashes go to the image at `into`, or
    /// without it to the slot's own memory for them (see [`GpuSlot::fetch_hashes`]).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for pages outside the image or a GPU without kernels,
    /// [`ErrorKind::Gpu`] when the driver refuses.
    pub fn hash_pages(
        &mut self,
        stream: &Stream,
        at: usize,
        pages: usize,
        into: Option<usize>,
    ) -> Result<()> {
        let source = self.image_span(at..at + pages * PAGE_BYTES)?;
        self.hash_runs(stream, &[(source, pages)], into)
    }

    /// Hashes the ranges of `plan` where they lie, each of them whole pages; the hashes go to the
    /// image at `into`, or without it to the slot's own memory for them.
    ///
    /// # Errors
    /// As [`GpuSlot::hash_pages`], and for ranges that are not whole pages.
    pub fn hash_in_place(
        &mut self,
        stream: &Stream,
        plan: &TransferPlan,
        regions: &[Region],
        into: Option<usize>,
    ) -> Result<()> {
        let runs: Vec<(DevicePointer, usize)> = plan
            .ranges()
            .iter()
            .map(|range| {
                let region = regions.get(range.region);
                let region = region.ok_or_else(|| outside("region", range.region))?;
                if !range.bytes.is_multiple_of(PAGE_BYTES) {
                    return Err(outside("whole pages of a KV cache", range.bytes));
                }
                let start = region.device_span(range.offset, range.bytes)?;
                Ok((start, range.bytes / PAGE_BYTES))
            })
            .collect::<Result<_>>()?;
        self.hash_runs(stream, &runs, into)
    }

    /// Hashes runs of pages, (address, pages) each, one behind the other.
    fn hash_runs(
        &mut self,
        stream: &Stream,
        runs: &[(DevicePointer, usize)],
        into: Option<usize>,
    ) -> Result<()> {
        let pages: usize = runs.iter().map(|(_, pages)| pages).sum();
        let hashes = match into {
            Some(into) => self.image_span(into..into + pages * 8)?,
            None if pages * 8 <= self.parts()?.device.hashes.len() => {
                self.parts()?.device.hashes.address()
            }
            None => return Err(outside("hashes", pages * 8)),
        };
        let gpu = self.gpu.clone();
        let Some(kernels) = gpu.kernels() else {
            let message = "hashing on a GPU without kernels";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        };
        let parts = self.parts_mut()?;
        // The last places are kept for these: those of a gather may still be in use.
        let bytes = runs.len() * DESCRIPTOR_BYTES;
        let end = parts.device.descriptors.len();
        let start = end
            .checked_sub(bytes)
            .ok_or_else(|| outside("descriptors", bytes))?;
        let mut first_page = 0;
        for (index, (source, pages)) in runs.iter().enumerate() {
            let at = start + index * DESCRIPTOR_BYTES;
            put_descriptor(parts, at, [*source, first_page, *pages as u64])?;
            first_page += *pages as u64;
        }
        let descriptors = send_descriptors(stream, parts, start..end)?;
        // SAFETY: the descriptors and hashes lie in this slot, the pages in it or in the KV cache's
        // regions, as the spans checked; all stay until the stream is past its last mark.
        let launched =
            unsafe { kernels.hash_pages(stream, descriptors, runs.len(), pages, hashes) };
        launched.map_err(|error| Error::gpu("hash pages", error))
    }

    /// Copies the hashes of `pages` pages to the pinned memory beside the slot.
    ///
    /// # Errors
    /// As [`GpuSlot::fetch`].
    pub fn fetch_hashes(&mut self, stream: &Stream, pages: usize) -> Result<()> {
        let parts = self.parts_mut()?;
        let source = parts.device.hashes.address();
        to_host(
            stream,
            sized(parts.host.hashes.as_mut_slice(), pages * 8)?,
            source,
        )
    }

    /// Returns the hashes of `pages` pages, as fetched.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for more pages than the slot has.
    pub fn hashes(&self, pages: usize) -> Result<Vec<u64>> {
        let bytes = self.parts()?.host.hashes.as_slice().get(..pages * 8);
        let bytes = bytes.ok_or_else(|| outside("hashes", pages * 8))?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}
