//! Memory of a device, and host memory pinned for it.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

use super::context::Context;
use super::sys::Pointer;
use crate::error::{Error, ErrorKind, Result, check};

/// An address in device memory, `CUdeviceptr`.
pub type DevicePointer = u64;

/// Bytes of a page of a GPU's memory, as other devices reach it (`GPU_PAGE_SIZE` of NVIDIA's
/// GPUDirect RDMA documentation).
const GPU_PAGE_BYTES: usize = 64 << 10;

/// Device memory of our own, freed when dropped.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Context,
    /// What was allocated.
    allocation: Pointer,
    /// Bytes of it before the memory.
    before: usize,
    bytes: usize,
}

impl DeviceMemory {
    /// Allocates memory that begins at a page of the GPU's. The driver gives large memory so, and
    /// cuts small memory from what it has, at 512 bytes or so: then a page more is allocated.
    pub(super) fn at_page(context: Context, bytes: usize) -> Result<Self> {
        let plain = Self::new(context.clone(), bytes)?;
        if plain.before_page() == 0 {
            return Ok(plain);
        }
        drop(plain);
        let mut longer = Self::new(context, bytes + GPU_PAGE_BYTES)?;
        longer.before = longer.before_page();
        longer.bytes = bytes;
        Ok(longer)
    }

    /// Bytes from the memory's start to the next page.
    fn before_page(&self) -> usize {
        let page = GPU_PAGE_BYTES as u64;
        (self.address().next_multiple_of(page) - self.address()) as usize
    }

    pub(super) fn new(context: Context, bytes: usize) -> Result<Self> {
        let mut address = 0;
        // SAFETY: the pointer is to a live integer.
        let allocated = context.call("cuMemAlloc", |api| unsafe {
            (api.allocate)(&raw mut address, bytes)
        });
        match allocated {
            Ok(()) => Ok(Self {
                context,
                allocation: address,
                before: 0,
                bytes,
            }),
            Err(error) if error.kind() == ErrorKind::OutOfMemory => {
                let free = context.memory_info().map_or(0, |(free, _)| free);
                let message = format!("asked for {bytes} bytes, {free} are free");
                Err(Error::new(ErrorKind::OutOfMemory, "cuMemAlloc", message))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the address of the first byte.
    pub fn address(&self) -> DevicePointer {
        self.allocation + self.before as u64
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the context that the memory belongs to.
    pub fn context(&self) -> &Context {
        &self.context
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: the memory is ours; freeing waits for what the device still does with it.
        let _ = self
            .context
            .call("cuMemFree", |api| unsafe { (api.free)(self.allocation) });
    }
}

/// Host memory that the devices reach directly, until this is dropped.
#[derive(Debug)]
pub struct PinnedRange {
    context: Context,
    address: usize,
    device_address: DevicePointer,
    bytes: usize,
}

impl PinnedRange {
    pub(super) fn new(context: Context, address: usize, bytes: usize) -> Result<Self> {
        let start = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the caller of `Context::pin` vouches for the range.
        context.call("cuMemHostRegister", |api| unsafe {
            (api.pin)(start, bytes, super::sys::HOST_REGISTER)
        })?;
        let mut range = Self {
            context,
            address,
            device_address: 0,
            bytes,
        };
        let mut address = 0;
        let context = &range.context;
        // SAFETY: the range was just pinned; the pointer is to a live integer.
        context.call("cuMemHostGetDevicePointer", |api| unsafe {
            (api.pinned_address)(&raw mut address, start, 0)
        })?;
        range.device_address = address;
        Ok(range)
    }

    /// Returns the address of the first byte, as the devices know it.
    pub fn device_address(&self) -> DevicePointer {
        self.device_address
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedRange {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.address);
        let unpinned = self.context.run(|| {
            // SAFETY: the range was pinned by `new` and is still mapped.
            let code = unsafe { (self.context.api().unpin)(start) };
            check("cuMemHostUnregister", code)
        });
        drop(unpinned);
    }
}
