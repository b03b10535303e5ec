//! Device memory: addresses that crash when the CPU touches them, and aliases that it may touch.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Alignment of what `cuMemAlloc` gives (CUDA programming guide: at least 256 bytes); whole pages
/// here, since each allocation is a mapping.
const ALIGNMENT: usize = 4096;

#[derive(Debug)]
struct Block {
    bytes: usize,
    mapped: usize,
    alias: usize,
    device: usize,
}

/// All device memory, by device address.
#[derive(Debug)]
pub(crate) struct Memory {
    blocks: BTreeMap<usize, Block>,
    /// Pinned host ranges: address and length.
    pub(crate) pinned: BTreeMap<usize, usize>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    blocks: BTreeMap::new(),
    pinned: BTreeMap::new(),
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
        let mapped = bytes.next_multiple_of(ALIGNMENT);
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
        let (address, alias) = (address.expose_provenance(), alias.expose_provenance());
        let block = Block {
            bytes,
            mapped,
            alias,
            device,
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
            let start = ptr::with_exposed_provenance_mut(start);
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

    /// Returns whether an address lies in device memory, however long the range.
    pub(crate) fn is_device(&self, address: u64) -> bool {
        let before = self.blocks.range(..=address as usize).next_back();
        before.is_some_and(|(start, block)| (address as usize) < start + block.mapped)
    }
}
