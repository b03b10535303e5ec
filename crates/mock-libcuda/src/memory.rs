//! Device memory: addresses that crash when the CPU touches them, and aliases that it may touch.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Each allocation is a mapping, so it has whole pages.
const PAGE: usize = 4096;
/// The driver cuts memory of no more than this from what it has, so that it begins in the middle of a
/// page (seen on an H200, driver 580; the CUDA programming guide promises 256 bytes).
const LARGE: usize = 1 << 20;
/// Where in its page it begins.
const SMALL_AT: usize = 1024;

#[derive(Debug)]
struct Block {
    bytes: usize,
    mapped: usize,
    /// Bytes of the mappings before the allocation.
    before: usize,
    alias: usize,
    device: usize,
    id: u64,
}

/// All device memory, by device address.
#[derive(Debug)]
pub(crate) struct Memory {
    blocks: BTreeMap<usize, Block>,
    /// Pinned host ranges: address and length.
    pub(crate) pinned: BTreeMap<usize, usize>,
    /// Allocations so far.
    allocated: u64,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    blocks: BTreeMap::new(),
    pinned: BTreeMap::new(),
    allocated: 0,
});

pub(crate) fn memory() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn device_limit() -> usize {
    let text = std::env::var("KVRAIL_MOCK_MEMORY_MIB").ok();
    text.and_then(|text| text.parse::<usize>().ok())
        .unwrap_or(1024)
        << 20
}

impl Memory {
    pub(crate) fn used(&self, device: usize) -> usize {
        let own = self.blocks.values().filter(|block| block.device == device);
        own.map(|block| block.bytes).sum()
    }

    pub(crate) fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Allocates; `None` when the device has not so much left.
    pub(crate) fn allocate(&mut self, device: usize, bytes: usize) -> Option<u64> {
        if bytes == 0 || self.used(device).checked_add(bytes)? > device_limit() {
            return None;
        }
        let before = if bytes <= LARGE { SMALL_AT } else { 0 };
        let mapped = (before + bytes).next_multiple_of(PAGE);
        // SAFETY: plain system calls on a descriptor of our own.
        let file = unsafe { libc::memfd_create(c"mock-device".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: as above.
        if file < 0 || unsafe { libc::ftruncate(file, i64::try_from(mapped).ok()?) } != 0 {
            return None;
        }
        let map = |protection| {
            // SAFETY: a new shared mapping at an address of the kernel's choice.
            unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    mapped,
                    protection,
                    libc::MAP_SHARED,
                    file,
                    0,
                )
            }
        };
        let address = map(libc::PROT_NONE);
        let alias = map(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: both mappings keep the file.
        unsafe { libc::close(file) };
        if address == libc::MAP_FAILED || alias == libc::MAP_FAILED {
            return None;
        }
        self.allocated += 1;
        let address = address.expose_provenance() + before;
        let alias = alias.expose_provenance() + before;
        let block = Block {
            bytes,
            mapped,
            before,
            alias,
            device,
            id: self.allocated,
        };
        self.blocks.insert(address, block);
        Some(address as u64)
    }

    /// Frees; returns whether there was such an allocation.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let Some(block) = self.blocks.remove(&(address as usize)) else {
            return false;
        };
        for start in [address as usize, block.alias] {
            let start = ptr::with_exposed_provenance_mut(start - block.before);
            // SAFETY: a mapping of ours that nobody knows any more.
            unsafe { libc::munmap(start, block.mapped) };
        }
        true
    }

    /// Returns the alias of a range of device memory, `None` for anything else.
    pub(crate) fn alias(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let (start, block) = self.blocks.range(..=address as usize).next_back()?;
        let offset = address as usize - start;
        let inside = offset.checked_add(bytes)? <= block.bytes;
        inside.then(|| ptr::with_exposed_provenance_mut(block.alias + offset))
    }

    /// Allocates pinned host memory.
    pub(crate) fn allocate_host(&mut self, bytes: usize) -> Option<*mut c_void> {
        let mapped = bytes.next_multiple_of(PAGE);
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        self.pinned.insert(start.expose_provenance(), mapped);
        Some(start)
    }

    /// Frees pinned host memory; returns whether there was such an allocation.
    pub(crate) fn free_host(&mut self, start: *mut c_void) -> bool {
        let Some(mapped) = self.pinned.remove(&start.expose_provenance()) else {
            return false;
        };
        // SAFETY: a mapping of ours that nobody knows any more.
        unsafe { libc::munmap(start, mapped) };
        true
    }

    /// Returns start and length of the allocation that an address lies in.
    pub(crate) fn range(&self, address: u64) -> Option<(u64, usize)> {
        let (start, block) = self.blocks.range(..=address as usize).next_back()?;
        ((address as usize) < start + block.bytes).then_some((*start as u64, block.bytes))
    }

    /// Returns the device whose memory an address lies in.
    pub(crate) fn device_of(&self, address: u64) -> Option<usize> {
        let (start, _) = self.range(address)?;
        Some(self.blocks.get(&(start as usize))?.device)
    }

    /// Returns what tells this allocation from one that was at the same address before.
    pub(crate) fn buffer_id(&self, address: u64) -> u64 {
        let block = self.blocks.range(..=address as usize).next_back();
        block.map_or(0, |(_, block)| block.id)
    }

    /// Returns whether an address lies in pinned host memory.
    pub(crate) fn is_pinned(&self, address: u64) -> bool {
        let before = self.pinned.range(..=address as usize).next_back();
        before.is_some_and(|(start, bytes)| (address as usize) < start + bytes)
    }

    /// Returns whether an address lies in device memory, however long the range.
    pub(crate) fn is_device(&self, address: u64) -> bool {
        let before = self.blocks.range(..=address as usize).next_back();
        before
            .is_some_and(|(start, block)| (address as usize) < start + block.mapped - block.before)
    }
}
