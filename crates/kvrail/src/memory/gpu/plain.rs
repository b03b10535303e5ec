//! Whole copies, for tools: memory of a GPU of our own, filled and read back, and one slot copied
//! to another in one piece, which is what the device does at best.
#![expect(unsafe_code, reason = "copies between memory of a GPU and of the host")]

use std::sync::Arc;

use kvrail_cuda::{DevicePointer, Stream};

use super::{CopyMethod, Gpu, GpuSlot};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Device, Region};

impl Gpu {
    /// Returns this GPU with another way of copying pieces than the one that was chosen for it.
    ///
    /// Whether the driver has that way shows when it is used.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for kernels that do not work on this device.
    pub fn with_method(&self, method: CopyMethod) -> Result<Self> {
        let is_ours = matches!(method, CopyMethod::HashingKernel | CopyMethod::Kernel);
        if is_ours && self.kernels().is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, self.reason()));
        }
        Ok(self.forced(method))
    }

    /// Allocates a region in the memory of this GPU, from a page on; it holds whatever was there
    /// before.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] when there is not so much free memory.
    pub fn allocate(&self, bytes: usize) -> Result<Region> {
        let failed = |error| Error::gpu(format!("{bytes} bytes on {}", self.device()), error);
        let memory = self.context().allocate_at_page(bytes).map_err(failed)?;
        let address = usize::try_from(memory.address())
            .map_err(|_| Error::new(ErrorKind::Gpu, "a device address beyond 64 bits"))?;
        // SAFETY: the allocation is as long and lives as long as its owner, the region.
        unsafe { Region::from_raw(address, bytes, self.device(), Arc::new(memory)) }
    }

    /// Copies `source` into a region on this GPU and waits until it is there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range outside the region or a region elsewhere,
    /// [`ErrorKind::Gpu`].
    pub fn write(&self, region: &Region, offset: usize, source: &[u8]) -> Result<()> {
        let target = self.span(region, offset, source.len())?;
        let stream = self.load_stream();
        // SAFETY: both ranges stay until the stream was waited for.
        let put = unsafe { stream.copy_to_device(target, source.as_ptr(), source.len()) };
        put.and_then(|()| stream.synchronize())
            .map_err(|error| Error::gpu("write to the GPU", error))
    }

    /// Copies a range of a region on this GPU into `target`.
    ///
    /// # Errors
    /// As [`Gpu::write`].
    pub fn read(&self, region: &Region, offset: usize, target: &mut [u8]) -> Result<()> {
        let source = self.span(region, offset, target.len())?;
        let stream = self.store_stream();
        // SAFETY: as in `write`.
        let put = unsafe { stream.copy_to_host(target.as_mut_ptr(), source, target.len()) };
        put.and_then(|()| stream.synchronize())
            .map_err(|error| Error::gpu("read from the GPU", error))
    }

    fn device(&self) -> Device {
        Device::Cuda(self.context().ordinal())
    }

    fn span(&self, region: &Region, offset: usize, bytes: usize) -> Result<DevicePointer> {
        if region.device() != self.device() {
            let message = format!("memory on {}, not on {}", region.device(), self.device());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        region.device_span(offset, bytes)
    }
}

impl GpuSlot {
    /// Copies the first `bytes` bytes of another slot's image to those of this one, in one piece.
    ///
    /// Both slots need a mark afterwards, as after all that is put on a stream.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for more bytes than an image has, [`ErrorKind::Gpu`].
    pub fn copy_image(&mut self, stream: &Stream, source: &mut Self, bytes: usize) -> Result<()> {
        let (from, to) = (source.image_span(0..bytes)?, self.image_span(0..bytes)?);
        source.unmarked = true;
        self.unmarked = true;
        // SAFETY: both images are as long, and their memory stays until the stream is past the
        // marks that follow.
        unsafe { stream.copy_on_device(to, from, bytes) }
            .map_err(|error| Error::gpu("copy a slot", error))
    }
}
