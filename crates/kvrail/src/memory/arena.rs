//! Where staging buffers are cut from: memory of the host, or of a GPU.
#![expect(unsafe_code, reason = "registers memory of a GPU with cuFile")]

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use kvrail_cuda::{
    Context, CuFileDriver, DeviceMemory, DevicePointer, PinnedRange, RegisteredBuffer,
};

use super::mapping::Mapping;
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};

/// Memory that staging buffers are cut from; it never moves and lives as long as any buffer.
pub trait Arena: fmt::Debug + Send + Sync + 'static {
    /// Returns the length in bytes.
    fn bytes(&self) -> usize;
}

/// Memory of the host: zeroed, page-aligned, pinned for a GPU where there is one.
#[derive(Debug)]
pub struct HostArena {
    // Dropped first: memory is unpinned before it is unmapped.
    pinned: Option<PinnedRange>,
    mapping: Mapping,
    id: u64,
}

/// Returns a number that no arena of this process had before.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl HostArena {
    /// Maps `bytes` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) when the system gives no
    /// such memory.
    pub fn new(bytes: usize) -> Result<Self> {
        Ok(Self {
            pinned: None,
            mapping: Mapping::new(bytes)?,
            id: next_id(),
        })
    }

    /// Maps `bytes` bytes and pins them, so that a GPU copies to and from them at full speed.
    ///
    /// # Errors
    /// As [`HostArena::new`], or [`ErrorKind::Gpu`](crate::ErrorKind::Gpu) when the driver does
    /// not pin them.
    pub fn pinned(bytes: usize, context: &Context) -> Result<Self> {
        let mapping = Mapping::new(bytes)?;
        let pinned = mapping.pin(context)?;
        Ok(Self {
            pinned: Some(pinned),
            mapping,
            id: next_id(),
        })
    }

    /// Returns whether the memory is pinned.
    pub fn is_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// Returns the address of the first byte as GPUs know it, `None` where it is not pinned.
    pub fn device_address(&self) -> Option<DevicePointer> {
        self.pinned.as_ref().map(PinnedRange::device_address)
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.mapping.address()
    }

    /// Returns what tells this arena from every other one of this process, also from a later one
    /// at the same address.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

impl Arena for HostArena {
    fn bytes(&self) -> usize {
        self.mapping.bytes()
    }
}

/// Memory of a GPU, which the CPU must not touch; registered with cuFile where that is in use.
#[derive(Debug)]
pub struct DeviceArena {
    // Dropped first: a registration ends before its memory is freed.
    registered: Option<RegisteredBuffer>,
    memory: DeviceMemory,
}

impl DeviceArena {
    /// Takes `memory` as an arena, `registered` with cuFile or not.
    pub fn new(memory: DeviceMemory, registered: Option<RegisteredBuffer>) -> Self {
        Self { registered, memory }
    }

    /// Registers `memory` with cuFile, all of it at once, and takes it as an arena.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] when cuFile does not take it, or it does not begin at a page: cuFile
    /// copies what is not aligned.
    pub fn registered(memory: DeviceMemory, driver: &CuFileDriver) -> Result<Self> {
        let (address, bytes) = (memory.address(), memory.bytes());
        if !address.is_multiple_of(PAGE_BYTES as u64) {
            let message = format!("memory of a GPU at {address:#x} does not begin at a page");
            return Err(Error::new(ErrorKind::Gpu, message));
        }
        // SAFETY: the arena keeps the memory, and drops the registration before it.
        let registered = unsafe { driver.register_buffer(memory.context(), address, bytes) };
        let registered =
            registered.map_err(|error| Error::gpu("register VRAM slots with cuFile", error))?;
        Ok(Self::new(memory, Some(registered)))
    }

    /// Returns the address of the first byte, as the GPU knows it.
    pub fn address(&self) -> DevicePointer {
        self.memory.address()
    }

    /// Returns whether cuFile knows the memory.
    pub fn is_registered(&self) -> bool {
        self.registered.is_some()
    }
}

impl Arena for DeviceArena {
    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}
