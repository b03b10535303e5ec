//! KV cache memory that cuFile reads and writes in place.
#![expect(unsafe_code, reason = "registers memory of a GPU with cuFile")]

use kvrail_cuda::{Context, CuFileDriver, DevicePointer, RegisteredBuffer};

use super::region::Region;
use crate::error::{Error, Result};

/// A region of KV cache, registered with cuFile as a whole until this is dropped.
#[derive(Debug)]
pub struct RegisteredRegion {
    // Dropped first: the registration ends before the region's owner may free the memory.
    _registered: RegisteredBuffer,
    region: Region,
    address: DevicePointer,
}

impl RegisteredRegion {
    /// Registers a region in the memory of the GPU that `context` is of.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for host memory,
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu) when cuFile does not take it: it is larger than
    /// what the GPU maps for I/O (BAR1), or memory of a kind that cannot be mapped.
    pub fn new(region: Region, driver: &CuFileDriver, context: &Context) -> Result<Self> {
        let address = region.device_span(0, region.bytes())?;
        // SAFETY: the region keeps the memory's owner, and is dropped after the registration.
        let registered = unsafe { driver.register_buffer(context, address, region.bytes()) };
        let message = "register the KV cache with cuFile";
        Ok(Self {
            _registered: registered.map_err(|error| Error::gpu(message, error))?,
            region,
            address,
        })
    }

    /// Returns the address of the first byte, as the GPU knows it.
    pub fn address(&self) -> DevicePointer {
        self.address
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.region.bytes()
    }
}
