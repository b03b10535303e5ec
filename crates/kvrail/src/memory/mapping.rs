//! An anonymous memory mapping: page-aligned, zeroed, given back when dropped.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::ptr::NonNull;

use kvrail_cuda::{Context, PinnedRange};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::{Error, ErrorKind, Result};

/// Memory of our own, aligned to the system's page size (a multiple of 4096).
#[derive(Debug)]
pub(super) struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value; it has no thread affinity.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out only the address; who accesses it is ruled by the holders.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` zeroed bytes; the kernel provides pages when they are first touched.
    pub(super) fn new(bytes: usize) -> Result<Self> {
        let failed = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("map {bytes} bytes of memory"),
            )
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no
        // existing memory.
        let mapped =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
        let address = mapped.map_err(|errno| failed().with_source(std::io::Error::from(errno)))?;
        let address = NonNull::new(address.cast()).ok_or_else(failed)?;
        Ok(Self { address, bytes })
    }

    /// Returns the length in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pins the memory for the GPU of `context`; whoever holds the pin must drop it before this.
    pub(super) fn pin(&self, context: &Context) -> Result<PinnedRange> {
        let address = self.address.as_ptr().expose_provenance();
        // SAFETY: the range is this mapping, which `HostArena` unmaps only after it dropped the pin.
        let pinned = unsafe { context.pin(address, self.bytes) };
        pinned.map_err(|error| Error::gpu("pin host memory", error))
    }

    /// Returns the first byte.
    pub(super) fn address(&self) -> NonNull<u8> {
        self.address
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mapping, and every holder of a part of
        // it keeps this value alive, so nobody can use the memory any more.
        let unmapped = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}
