//! Head and page table of a slot's image, on the host: small, and the CPU's to make and to check.

use kvrail_cuda::Stream;

use super::slot::GpuSlot;
use super::transfer::{outside, to_device, to_host};
use crate::chunk::PAGE_BYTES;
use crate::error::Result;

impl GpuSlot {
    /// Copies head and page table of the image, which begins at `table`, to the pinned memory
    /// beside the slot.
    ///
    /// # Errors
    /// As [`GpuSlot::fetch`].
    pub fn fetch_frame(&mut self, stream: &Stream, table: usize) -> Result<()> {
        let head = self.image_span(0..PAGE_BYTES)?;
        let table_bytes = self.parts()?.host.table.len();
        let table = self.image_span(table..table + table_bytes)?;
        let host = &mut self.parts_mut()?.host;
        to_host(stream, host.head.as_mut_slice(), head)?;
        to_host(stream, host.table.as_mut_slice(), table)
    }

    /// Copies the head from the pinned memory beside the slot to the image.
    ///
    /// # Errors
    /// As [`GpuSlot::fetch`].
    pub fn send_head(&mut self, stream: &Stream) -> Result<()> {
        let target = self.image_span(0..PAGE_BYTES)?;
        to_device(stream, target, self.parts_mut()?.host.head.as_slice())
    }

    /// Returns head and page table as fetched.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for a slot taken apart.
    pub fn frame(&self) -> Result<(&[u8], &[u8])> {
        let host = &self.parts()?.host;
        Ok((host.head.as_slice(), host.table.as_slice()))
    }

    /// Returns the pinned memory of the head, for writing.
    ///
    /// # Errors
    /// As [`GpuSlot::frame`].
    pub fn head_mut(&mut self) -> Result<&mut [u8]> {
        let parts = self.parts.as_mut().ok_or_else(|| outside("slot", 0))?;
        Ok(parts.host.head.as_mut_slice())
    }
}
