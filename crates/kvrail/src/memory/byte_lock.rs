//! Locks of single bytes of a file that belong to an open file, `F_OFD_SETLK` of fcntl(2).
//!
//! Every opening of a file is a holder of its own, in one process or several, and the kernel takes
//! a lock back when its file is closed: also that of a process that was killed. rustix has only the
//! older locks, which belong to a process as a whole.
#![expect(unsafe_code, reason = "a system call that has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a lock shuts out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LockKind {
    /// Those who write.
    Read,
    /// Everybody else.
    Write,
}

/// Takes a lock of the byte at `offset`, which need not exist, for an open file. Does not wait:
/// returns whether it was free. A lock that the file holds there already is changed to `kind`.
///
/// # Errors
/// The system's: `EBADF` for a file that is not open for reading (or writing, for
/// [`LockKind::Write`]).
pub(super) fn try_lock(file: BorrowedFd<'_>, offset: u64, kind: LockKind) -> io::Result<bool> {
    let kind = match kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    };
    match set(file, offset, kind) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Gives the lock of a byte back.
///
/// # Errors
/// The system's; the lock goes when the file is closed, then.
pub(super) fn unlock(file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
    set(file, offset, libc::F_UNLCK)
}

fn set(file: BorrowedFd<'_>, offset: u64, kind: libc::c_int) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain C structure of numbers, for which zeroes are values.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = offset;
    lock.l_len = 1;
    // SAFETY: the descriptor is open as long as it is borrowed; the kernel reads the structure, which
    // lives until the call returns, and keeps no address.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn each_opening_holds_its_own_locks_and_closing_gives_them_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        File::create(&path).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (first, second) = (open(), open());
        assert!(try_lock(first.as_fd(), 7, LockKind::Read).unwrap());
        assert!(try_lock(second.as_fd(), 7, LockKind::Read).unwrap());
        assert!(!try_lock(second.as_fd(), 7, LockKind::Write).unwrap());
        assert!(try_lock(second.as_fd(), 8, LockKind::Write).unwrap());
        assert!(!try_lock(first.as_fd(), 8, LockKind::Read).unwrap());
        unlock(first.as_fd(), 7).unwrap();
        assert!(try_lock(second.as_fd(), 7, LockKind::Write).unwrap());
        assert!(!try_lock(first.as_fd(), 7, LockKind::Read).unwrap());
        drop(second);
        assert!(try_lock(first.as_fd(), 7, LockKind::Write).unwrap());
    }
}
