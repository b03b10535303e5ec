//! A span of memory that holds KV cache, with its device and its owner.
#![expect(unsafe_code, reason = "turns the address of a KV cache into bytes")]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use kvrail_cuda::DevicePointer;

use super::mapping::Mapping;
use super::streaming;
use crate::error::{Error, ErrorKind, Result};

/// Where memory lies.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Memory of the host, which the CPU may touch.
    Host,
    /// Memory of the CUDA device with this ordinal, which only the device may touch.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => out.write_str("cpu"),
            Self::Cuda(ordinal) => write!(out, "cuda:{ordinal}"),
        }
    }
}

/// A span of memory that holds KV cache; clones share it and keep its owner alive.
///
/// The serving engine owns the contents: kvrail reads only blocks that it was told are complete,
/// and writes only blocks that it was given for a load.
#[derive(Clone)]
pub struct Region {
    address: NonNull<u8>,
    bytes: usize,
    device: Device,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a region is an address with a length; what may be accessed when is ruled by the
// contract of `from_raw` and of the callers of load and store, not by the thread.
unsafe impl Send for Region {}
// SAFETY: as above; all access goes through raw copies that never form references to the memory.
unsafe impl Sync for Region {}

impl Region {
    /// Makes a region of memory that somebody else allocated on `device`.
    ///
    /// # Safety
    /// `bytes` bytes from `address` must be valid for reads and writes by `device` as long as
    /// `owner` lives; `address` is one that the device itself uses (a `CUdeviceptr` for CUDA).
    /// Others may access the memory at the same time, but not the blocks of a load or a store
    /// that is going on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a null address or an empty or overflowing span.
    pub unsafe fn from_raw(
        address: usize,
        bytes: usize,
        device: Device,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let pointer = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(address));
        match pointer {
            Some(pointer)
                if bytes > 0
                    && isize::try_from(bytes).is_ok()
                    && address.checked_add(bytes).is_some() =>
            {
                Ok(Self {
                    address: pointer,
                    bytes,
                    device,
                    owner,
                })
            }
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("memory region of {bytes} bytes at {address:#x}"),
            )),
        }
    }

    /// Makes a region of `bytes` zeroed bytes of our own.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the system gives no such memory.
    pub fn zeroed(bytes: usize) -> Result<Self> {
        let mapping = Mapping::new(bytes)?;
        let address = mapping.address();
        Ok(Self {
            address,
            bytes,
            device: Device::Host,
            owner: Arc::new(mapping),
        })
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the device that holds the memory.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Copies `target.len()` bytes out of the region.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the range lies outside the region.
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        let source = self.host_span(offset, target.len())?;
        // SAFETY: `host_span` checked that the range lies inside the region, which `owner` keeps valid;
        // `target` is exclusive memory of ours, so the two cannot overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_mut_ptr(), target.len());
        };
        Ok(())
    }

    /// Copies `source` into the region.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the range lies outside the region.
    pub fn copy_in(&self, offset: usize, source: &[u8]) -> Result<()> {
        let target = self.host_span(offset, source.len())?;
        // SAFETY: as in `copy_out`, with the roles exchanged; the blocks are the caller's alone
        // while the load goes on.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_ptr(), source.len());
        };
        Ok(())
    }

    /// Copies `source` into the region, past the CPU's caches where it is long: for bytes that this
    /// thread does not look at again.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the range lies outside the region.
    pub fn stream_in(&self, offset: usize, source: &[u8]) -> Result<()> {
        let target = self.host_span(offset, source.len())?;
        // SAFETY: as in `copy_in`.
        unsafe { streaming::copy(source.as_ptr(), target.as_ptr(), source.len()) };
        Ok(())
    }

    /// Returns the address of a range for the device that holds it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the range lies outside the region, or in host memory.
    pub fn device_span(&self, offset: usize, bytes: usize) -> Result<DevicePointer> {
        if self.device == Device::Host {
            let message = "host memory where memory of a GPU was expected";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.check(offset, bytes)?;
        Ok((self.address.addr().get() + offset) as DevicePointer)
    }

    /// Returns the address of a range that the CPU may touch.
    fn host_span(&self, offset: usize, bytes: usize) -> Result<NonNull<u8>> {
        if self.device != Device::Host {
            let message = format!("the CPU cannot touch memory on {}", self.device);
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.check(offset, bytes)?;
        // SAFETY: the offset lies inside the region, so inside one allocation.
        Ok(unsafe { self.address.add(offset) })
    }

    /// Checks that a range lies inside the region.
    fn check(&self, offset: usize, bytes: usize) -> Result<()> {
        if offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.bytes)
        {
            return Ok(());
        }
        let message = format!(
            "range of {bytes} bytes at {offset} in a region of {}",
            self.bytes
        );
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Region")
            .field("address", &self.address)
            .field("bytes", &self.bytes)
            .field("device", &self.device)
            .field("holders", &Arc::strong_count(&self.owner))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_stay_inside_the_region() {
        let region = Region::zeroed(100).unwrap();
        region.copy_in(90, &[7; 10]).unwrap();
        let mut read = [0; 11];
        region.copy_out(89, &mut read).unwrap();
        assert_eq!(read, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert!(region.copy_in(91, &[7; 10]).is_err());
        assert!(region.copy_out(usize::MAX, &mut read).is_err());
    }

    #[test]
    fn the_cpu_does_not_touch_memory_of_a_gpu() {
        // SAFETY: refused before any access.
        let region = unsafe { Region::from_raw(4096, 64, Device::Cuda(1), Arc::new(())) }.unwrap();
        assert!(region.copy_out(0, &mut [0; 8]).is_err());
        assert!(region.copy_in(0, &[0; 8]).is_err());
        assert_eq!(region.device_span(8, 56).unwrap(), 4104);
        assert!(region.device_span(9, 56).is_err());
        assert!(Region::zeroed(64).unwrap().device_span(0, 1).is_err());
    }

    #[test]
    fn an_impossible_span_is_refused() {
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(());
        for (address, bytes) in [(0, 8), (8, 0), (usize::MAX - 3, 8)] {
            // SAFETY: refused before any access.
            let region =
                unsafe { Region::from_raw(address, bytes, Device::Host, Arc::clone(&owner)) };
            assert!(region.is_err(), "{address:#x} {bytes}");
        }
    }
}
