//! A span of memory that holds KV cache, with its device and its owner.
#![expect(unsafe_code, reason = "turns the address of a KV cache into bytes")]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::mapping::Mapping;
use crate::error::{Error, ErrorKind, Result};

/// Where memory lies.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Memory of the host, which the CPU may touch.
    Host,
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
    /// Makes a region of host memory that somebody else allocated.
    ///
    /// # Safety
    /// `bytes` bytes from `address` must be valid for reads and writes as long as `owner` lives.
    /// Others may access the memory at the same time, but not the blocks of a load or a store
    /// that is going on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a null address or an empty or overflowing span.
    pub unsafe fn from_raw(
        address: usize,
        bytes: usize,
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
                    device: Device::Host,
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
        let source = self.span(offset, target.len())?;
        // SAFETY: `span` checked that the range lies inside the region, which `owner` keeps valid;
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
        let target = self.span(offset, source.len())?;
        // SAFETY: as in `copy_out`, with the roles exchanged; the blocks are the caller's alone
        // while the load goes on.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), target.as_ptr(), source.len());
        };
        Ok(())
    }

    /// Returns the address of a range that lies inside the region.
    fn span(&self, offset: usize, bytes: usize) -> Result<NonNull<u8>> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let message = format!(
                "range of {bytes} bytes at {offset} in a region of {}",
                self.bytes
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        // SAFETY: the offset lies inside the region, so inside one allocation.
        Ok(unsafe { self.address.add(offset) })
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
    fn an_impossible_span_is_refused() {
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(());
        for (address, bytes) in [(0, 8), (8, 0), (usize::MAX - 3, 8)] {
            // SAFETY: refused before any access.
            let region = unsafe { Region::from_raw(address, bytes, Arc::clone(&owner)) };
            assert!(region.is_err(), "{address:#x} {bytes}");
        }
    }
}
