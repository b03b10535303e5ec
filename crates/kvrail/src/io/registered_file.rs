//! A file as cuFile takes it.
//!
//! cuFile knows a few flags of open files and refuses all others with 5019: `O_NOFOLLOW`,
//! `O_NONBLOCK` and `O_APPEND` among them (seen with libcufile 1.11 to 1.20; the tests ask the real
//! library again).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kvrail_cuda::{CuFileDriver, FileHandle};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::error::Error;

/// An open file that cuFile knows, until this is dropped.
#[derive(Debug)]
pub(super) struct RegisteredFile {
    // Dropped first: cuFile must forget the file before its descriptor is closed.
    handle: FileHandle,
    _second: Option<OwnedFd>,
}

/// Why cuFile does not know a file.
#[derive(Debug, Clone)]
pub(super) enum Refusal {
    /// cuFile refused it.
    Cufile(kvrail_cuda::Error),
    /// The system refused to make it one that cuFile takes.
    System(Errno),
}

impl RegisteredFile {
    /// Registers `file`, which must stay open as long as the value lives.
    pub(super) fn new(driver: &CuFileDriver, file: BorrowedFd<'_>) -> Result<Self, Refusal> {
        let second = acceptable(file).map_err(Refusal::System)?;
        let taken = second.as_ref().map_or(file, AsFd::as_fd);
        Ok(Self {
            handle: driver.register_file(taken).map_err(Refusal::Cufile)?,
            _second: second,
        })
    }

    /// Returns cuFile's handle.
    pub(super) fn handle(&self) -> &FileHandle {
        &self.handle
    }
}

impl Refusal {
    /// Returns it as an error about the file at `path`.
    pub(super) fn to_error(&self, path: &Path) -> Error {
        match self {
            Self::Cufile(error) => {
                Error::gpu("register with cuFile", error.clone()).with_path(path)
            }
            Self::System(errno) => Error::io("reopen for cuFile", path, (*errno).into()),
        }
    }
}

/// Takes flags off the open file that cuFile does not take, or opens it a second time without them.
fn acceptable(file: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let flags = fcntl_getfl(file)?;
    if flags.contains(OFlags::NOFOLLOW) {
        // This flag stays with an open file. By the descriptor it is the same file again, whatever
        // its name leads to by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let kept = flags.intersection(OFlags::RWMODE | OFlags::DIRECT);
        return rustix::fs::open(path, kept | OFlags::CLOEXEC, Mode::empty()).map(Some);
    }
    // It was for opening: nothing but a regular file came of that.
    if flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(file, flags.difference(OFlags::NONBLOCK))?;
    }
    Ok(None)
}
