//! An anonymous memory mapping: page-aligned, zeroed, given back when dropped.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::ptr::NonNull;

use kvrail_cuda::{Context, PinnedRange};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::{Error, ErrorKind, Result};

/// Bytes from which huge pages are asked for: one of them (x86-64, and arm64 with 4 KiB pages).
const HUGE_PAGE_BYTES: usize = 2 << 20;

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
    /// Maps `bytes` zeroed bytes; the kernel provides pages when they are first touched, huge ones
    /// where it has some: they take a 512th of the faults, and of the work of pinning them.
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
        let mapping = Self { address, bytes };
        mapping.ask_for_huge_pages();
        Ok(mapping)
    }

    fn ask_for_huge_pages(&self) {
        if self.bytes < HUGE_PAGE_BYTES {
            return;
        }
        let address = self.address.as_ptr().cast();
        // A kernel without them says EINVAL and gives small ones.
        // SAFETY: the range is this mapping; what is in it stays as it is.
        let _ = unsafe { madvise(address, self.bytes, Advice::LinuxHugepage) };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the kB of huge pages that the kernel counts in the mapping that begins at an address.
    fn huge_kb(address: usize) -> Option<u64> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let start = maps.find(&format!("\n{address:x}-"))?;
        let line = maps[start..]
            .lines()
            .find(|line| line.starts_with("AnonHugePages:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    #[test]
    fn memory_is_zeroed_and_large_mappings_have_huge_pages_where_there_are_some() {
        let bytes = 16 * HUGE_PAGE_BYTES;
        let mapping = Mapping::new(bytes).unwrap();
        // SAFETY: the range is the mapping's, which outlives it, and nobody else has it.
        let content = unsafe { std::slice::from_raw_parts_mut(mapping.address().as_ptr(), bytes) };
        assert!(content.iter().all(|byte| *byte == 0));
        content.fill(1);
        let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        let is_never = enabled.is_ok_and(|enabled| enabled.contains("[never]"));
        match huge_kb(mapping.address().as_ptr().addr()) {
            Some(huge) if huge > 0 => println!("{huge} kB of {} are huge pages", bytes / 1024),
            _ if is_never => eprintln!("skipped: this system has no transparent huge pages"),
            // Joined with a neighbour in the table, or no huge page was free: that is no error.
            found => eprintln!("skipped: no huge pages were free or seen: {found:?}"),
        }
    }
}
