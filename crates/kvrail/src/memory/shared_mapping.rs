//! A part of a file in memory, seen by all processes that map it.
#![expect(
    unsafe_code,
    reason = "maps a file, and makes words and bytes of what is mapped"
)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a file, unmapped when dropped.
#[derive(Debug)]
struct Mapped {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is plain memory owned by this value; it has no thread affinity.
unsafe impl Send for Mapped {}
// SAFETY: `&Mapped` gives out only the address; who accesses it is ruled by the two types below.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(file: BorrowedFd<'_>, offset: u64, bytes: usize, may_write: bool) -> io::Result<Self> {
        let protection = match may_write {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let mapped = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        };
        let address = NonNull::new(mapped?.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, bytes })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mapping, and what was given out of it
        // borrows this value.
        let unmapped = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}

/// 64-bit words that processes share.
#[derive(Debug)]
pub(super) struct SharedWords {
    mapped: Mapped,
}

impl SharedWords {
    /// Maps the first `count` words of a file, which must have them.
    pub(super) fn new(file: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let bytes = count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        let mapped = Mapped::new(file, 0, bytes, true)?;
        Ok(Self { mapped })
    }

    /// Returns a word; `None` behind the last one.
    pub(super) fn get(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.mapped.bytes / 8 {
            return None;
        }
        // SAFETY: the index is below the number of words, so the address lies in the mapping.
        let address = unsafe { self.mapped.address.as_ptr().cast::<AtomicU64>().add(index) };
        // SAFETY: a mapping begins at a page, so its words are aligned; all values are valid; every
        // process accesses them by atomic operations alone; the mapping lives as long as `self`.
        Some(unsafe { &*address })
    }
}

/// Bytes that processes share and that this one only reads.
#[derive(Debug)]
pub(super) struct SharedBytes {
    mapped: Mapped,
}

impl SharedBytes {
    /// Maps `bytes` bytes of a file from `offset` on, a multiple of the page size. The file must
    /// have them, and nobody may shorten it: a read behind its end kills the process.
    pub(super) fn new(file: BorrowedFd<'_>, offset: u64, bytes: usize) -> io::Result<Self> {
        let mapped = Mapped::new(file, offset, bytes, false)?;
        Ok(Self { mapped })
    }

    /// Returns a range of the bytes; `None` where there are fewer.
    ///
    /// # Safety
    /// No process may change the bytes of the range as long as the slice lives.
    pub(super) unsafe fn get(&self, offset: usize, bytes: usize) -> Option<&[u8]> {
        let end = offset.checked_add(bytes)?;
        if end > self.mapped.bytes {
            return None;
        }
        // SAFETY: the offset lies in the mapping.
        let start = unsafe { self.mapped.address.as_ptr().add(offset) };
        // SAFETY: the range lies in the mapping, which lives as long as `self`; the kernel zeroed
        // what was never written; the caller vouches for nobody changing it.
        Some(unsafe { std::slice::from_raw_parts(start, bytes) })
    }
}
