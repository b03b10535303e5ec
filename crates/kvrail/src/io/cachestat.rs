//! What the page cache has of a file: `cachestat(2)`, of Linux 6.5.
//!
//! Neither libc nor rustix know the call yet.
#![expect(unsafe_code, reason = "a system call that has no safe wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Its number, the same wherever Linux numbers new calls alike: all architectures but Alpha and MIPS.
#[cfg(not(any(target_arch = "mips", target_arch = "mips64")))]
const CACHESTAT: Option<libc::c_long> = Some(451);
#[cfg(any(target_arch = "mips", target_arch = "mips64"))]
const CACHESTAT: Option<libc::c_long> = None;

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    bytes: u64,
}

/// `struct cachestat` of linux/mman.h; all counts are in pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Returns how many pages the page cache has of a range of a file, those on their way included.
/// Reads nothing, waits for nothing and changes nothing.
///
/// The kernel tells those who own the file or may write to it.
///
/// # Errors
/// The system's: `NOSYS` before Linux 6.5, `PERM` where it does not tell.
pub(super) fn cached_pages(file: BorrowedFd<'_>, offset: u64, bytes: u64) -> Result<u64, Errno> {
    let number = CACHESTAT.ok_or(Errno::NOSYS)?;
    let range = CachestatRange { offset, bytes };
    let mut found = Cachestat::default();
    let flags: libc::c_uint = 0;
    // SAFETY: the descriptor is open as long as it is borrowed. The kernel reads one structure and
    // writes the other, whose layouts are its own and which live until the call returns; it keeps
    // no address.
    let returned = unsafe {
        libc::syscall(
            number,
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            flags,
        )
    };
    match returned {
        0 => Ok(found.cached),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        }
    }
}
