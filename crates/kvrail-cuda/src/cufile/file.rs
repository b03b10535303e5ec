//! A file registered with cuFile, and transfers to and from it.
#![expect(unsafe_code, reason = "calls cuFile")]

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::driver::{CuFileDriver, pointer};
use super::sys::{BASE_ERROR, Description, Descriptor, Handle, OPAQUE_FD};
use super::{calls, check};
use crate::error::{Error, ErrorKind, Result};

/// A registered file. Whoever holds it keeps the file open: cuFile works on its descriptor.
#[derive(Debug)]
pub struct FileHandle {
    driver: CuFileDriver,
    handle: Handle,
}

// SAFETY: cuFile's calls are thread-safe (cuFile API reference, thread safety).
unsafe impl Send for FileHandle {}
// SAFETY: as above.
unsafe impl Sync for FileHandle {}

/// `struct iovec` of POSIX, with the address in the memory of a device.
#[repr(C)]
struct Piece {
    address: *mut c_void,
    bytes: usize,
}

impl FileHandle {
    pub(super) fn register(driver: CuFileDriver, file: BorrowedFd<'_>) -> Result<Self> {
        let _call = driver.begin("cuFileHandleRegister")?;
        let mut description = Description {
            kind: OPAQUE_FD,
            // The wider member first: no byte of the union stays undefined.
            descriptor: Descriptor {
                handle: ptr::null_mut(),
            },
            operations: ptr::null(),
        };
        description.descriptor.fd = file.as_raw_fd();
        let mut handle = ptr::null_mut();
        // SAFETY: both pointers are to live values; the library copies what it keeps.
        let status = unsafe { (driver.api().register_file)(&raw mut handle, &raw mut description) };
        check("cuFileHandleRegister", status)?;
        Ok(Self { driver, handle })
    }

    /// Reads `bytes` bytes at `file_offset` to `base + buffer_offset`; returns how many came.
    ///
    /// # Safety
    /// `base` is registered and the range lies in that memory; nobody else touches it meanwhile.
    /// A CUDA context of the device is current.
    ///
    /// # Errors
    /// What the library said; [`ErrorKind::Failed`] with the `errno` where the system refused.
    pub unsafe fn read(
        &self,
        base: u64,
        bytes: usize,
        file_offset: u64,
        buffer_offset: usize,
    ) -> Result<usize> {
        let _call = self.driver.begin("cuFileRead")?;
        let (file_offset, buffer_offset) = offsets(file_offset, buffer_offset)?;
        let read = self.driver.api().read;
        // SAFETY: the caller vouches for the range; the handle is live.
        let moved = unsafe {
            read(
                self.handle,
                pointer(base),
                bytes,
                file_offset,
                buffer_offset,
            )
        };
        ended("cuFileRead", moved)
    }

    /// Writes `bytes` bytes from `base + buffer_offset` at `file_offset`; returns how many went.
    ///
    /// # Safety
    /// As [`FileHandle::read`], except that others may read the memory.
    ///
    /// # Errors
    /// As [`FileHandle::read`].
    pub unsafe fn write(
        &self,
        base: u64,
        bytes: usize,
        file_offset: u64,
        buffer_offset: usize,
    ) -> Result<usize> {
        let _call = self.driver.begin("cuFileWrite")?;
        let (file_offset, buffer_offset) = offsets(file_offset, buffer_offset)?;
        let write = self.driver.api().write;
        // SAFETY: as in `read`.
        let moved = unsafe {
            write(
                self.handle,
                pointer(base),
                bytes,
                file_offset,
                buffer_offset,
            )
        };
        ended("cuFileWrite", moved)
    }

    /// Reads from `file_offset` on into pieces of memory, (address, bytes) each, in their order.
    ///
    /// # Safety
    /// As [`FileHandle::read`], for each piece.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the library has no such call, else as [`FileHandle::read`].
    pub unsafe fn read_vectored(&self, pieces: &[(u64, usize)], file_offset: u64) -> Result<usize> {
        const NAME: &str = "cuFileReadv";
        let _call = self.driver.begin(NAME)?;
        let call = self.driver.api().read_vectored.ok_or_else(|| lacks(NAME))?;
        let (file_offset, _) = offsets(file_offset, 0)?;
        let list = list(pieces);
        // SAFETY: the caller vouches for the pieces; list and handle are live.
        let moved = unsafe {
            call(
                self.handle,
                list.as_ptr().cast(),
                list.len(),
                file_offset,
                0,
            )
        };
        ended(NAME, moved)
    }

    /// Writes pieces of memory, (address, bytes) each, from `file_offset` on.
    ///
    /// # Safety
    /// As [`FileHandle::write`], for each piece.
    ///
    /// # Errors
    /// As [`FileHandle::read_vectored`].
    pub unsafe fn write_vectored(
        &self,
        pieces: &[(u64, usize)],
        file_offset: u64,
    ) -> Result<usize> {
        const NAME: &str = "cuFileWritev";
        let _call = self.driver.begin(NAME)?;
        let call = self
            .driver
            .api()
            .write_vectored
            .ok_or_else(|| lacks(NAME))?;
        let (file_offset, _) = offsets(file_offset, 0)?;
        let list = list(pieces);
        // SAFETY: as in `read_vectored`.
        let moved = unsafe {
            call(
                self.handle,
                list.as_ptr().cast(),
                list.len(),
                file_offset,
                0,
            )
        };
        ended(NAME, moved)
    }
}

impl Drop for FileHandle {
    fn drop(&mut self) {
        let Some(_call) = self.driver.begin_end() else {
            return;
        };
        // SAFETY: the handle is ours, and no transfer borrows it any more.
        unsafe { (self.driver.api().deregister_file)(self.handle) };
    }
}

fn list(pieces: &[(u64, usize)]) -> Vec<Piece> {
    let piece = |&(address, bytes): &(u64, usize)| Piece {
        address: pointer(address),
        bytes,
    };
    pieces.iter().map(piece).collect()
}

fn offsets(file: u64, buffer: usize) -> Result<(i64, i64)> {
    match (i64::try_from(file), i64::try_from(buffer)) {
        (Ok(file), Ok(buffer)) => Ok((file, buffer)),
        _ => {
            let message = format!("offsets {file} and {buffer}");
            Err(Error::new(ErrorKind::InvalidArgument, "cuFile", message))
        }
    }
}

fn lacks(name: &'static str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        name,
        "the library has none (1.20 is the first with it)",
    )
}

/// Reads the result of a transfer, and then has the exit wait for those that follow the first.
fn ended(name: &'static str, moved: isize) -> Result<usize> {
    let bytes = count(name, moved);
    calls::moved();
    bytes
}

/// Reads the result of a transfer: bytes, -1 with `errno`, or a negative error below -5000.
fn count(name: &'static str, moved: isize) -> Result<usize> {
    if let Ok(bytes) = usize::try_from(moved) {
        return Ok(bytes);
    }
    if moved < -BASE_ERROR {
        let code = i32::try_from(-moved).unwrap_or(i32::MAX);
        return Err(Error::cufile(name, code, 0));
    }
    // Read at once: the next call of the C library may change it.
    let system = std::io::Error::last_os_error();
    // Where not the system but the library refused, it leaves errno as it was.
    let message = format!("-1, with errno as it may have been before: {system}");
    Err(Error::new(ErrorKind::Failed, name, message))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
    use super::*;

    #[test]
    fn results_are_bytes_errno_or_codes() {
        assert_eq!(count("cuFileRead", 4096).unwrap(), 4096);
        assert_eq!(count("cuFileRead", 0).unwrap(), 0);
        assert_eq!(count("cuFileRead", -5030).unwrap_err().code(), Some(5030));
        let by_errno = count("cuFileRead", -1).unwrap_err();
        assert_eq!(by_errno.code(), None);
        assert!(by_errno.to_string().contains("as it may have been before"));
    }

    #[test]
    fn pieces_are_laid_out_as_iovec() {
        assert_eq!(size_of::<Piece>(), 16);
        assert_eq!(std::mem::offset_of!(Piece, bytes), 8);
    }
}
