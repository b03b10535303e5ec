//! Device memory of our own that cuFile knows, with transfers that cannot leave it.
#![expect(unsafe_code, reason = "calls cuFile")]

use std::ops::Range;

use super::driver::{CuFileDriver, RegisteredBuffer};
use super::file::FileHandle;
use crate::driver::DeviceMemory;
use crate::error::{Error, ErrorKind, Result};

/// Device memory, registered with cuFile as long as it lives.
///
/// Transfers are cuFile's own, one call each, and may be short.
#[derive(Debug)]
pub struct RegisteredMemory {
    // Dropped first: a registration ends before its memory is freed.
    _registered: RegisteredBuffer,
    memory: DeviceMemory,
}

impl RegisteredMemory {
    /// Registers `memory`.
    ///
    /// # Errors
    /// What the library said: 5036 when the memory cannot be pinned for I/O.
    pub fn new(driver: &CuFileDriver, memory: DeviceMemory) -> Result<Self> {
        let (address, bytes) = (memory.address(), memory.bytes());
        // SAFETY: the memory is freed after the registration, in the order of the fields.
        let registered = unsafe { driver.register_buffer(memory.context(), address, bytes) };
        Ok(Self {
            _registered: registered?,
            memory,
        })
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Reads the bytes of the file from `file_offset` on into `range`; returns how many came.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range outside the memory, else as
    /// [`FileHandle::read`].
    pub fn read(
        &mut self,
        file: &FileHandle,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<usize> {
        let bytes = self.check(&range)?;
        let base = self.memory.address();
        // SAFETY: the range lies in the memory, which is registered; `&mut self` keeps others off.
        let read = || unsafe { file.read(base, bytes, file_offset, range.start) };
        self.memory.context().run(read)
    }

    /// Writes `range` to the file from `file_offset` on; returns how many bytes went.
    ///
    /// # Errors
    /// As [`RegisteredMemory::read`].
    pub fn write(&self, file: &FileHandle, range: Range<usize>, file_offset: u64) -> Result<usize> {
        let bytes = self.check(&range)?;
        let base = self.memory.address();
        // SAFETY: as in `read`; others can only read the memory at the same time.
        let write = || unsafe { file.write(base, bytes, file_offset, range.start) };
        self.memory.context().run(write)
    }

    fn check(&self, range: &Range<usize>) -> Result<usize> {
        let bytes = range.end.checked_sub(range.start);
        match bytes.filter(|_| range.end <= self.memory.bytes()) {
            Some(bytes) => Ok(bytes),
            None => {
                let message = format!("{range:?} of {} bytes", self.memory.bytes());
                Err(Error::new(ErrorKind::InvalidArgument, "cuFile", message))
            }
        }
    }
}
