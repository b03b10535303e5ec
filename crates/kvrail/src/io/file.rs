//! An open file with its path, opened so that nothing but a regular file of ours is touched.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvrail_cuda::{CuFileDriver, FileHandle};
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};

/// How to open a chunk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// A file that must not exist yet, for writing; mode 0600.
    CreateNew,
}

/// An open file and the path it was opened by.
#[derive(Debug)]
pub struct IoFile {
    // Dropped first: cuFile must forget the file before it is closed.
    registration: OnceLock<Result<FileHandle, kvrail_cuda::Error>>,
    file: File,
    path: PathBuf,
    direct: bool,
}

impl IoFile {
    /// Opens `path`; `direct` asks for O_DIRECT.
    ///
    /// A symbolic link as the last part of the path is refused, and so is waiting for a FIFO.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn open(path: &Path, mode: OpenMode, direct: bool) -> Result<Self> {
        let mut flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        flags |= match mode {
            OpenMode::Read => OFlags::RDONLY,
            OpenMode::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
        };
        if direct {
            flags |= OFlags::DIRECT;
        }
        let opened = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
        let file = opened.map_err(|errno| Error::io("open", path, errno.into()))?;
        Ok(Self {
            registration: OnceLock::new(),
            file: file.into(),
            path: path.to_path_buf(),
            direct,
        })
    }

    /// Returns the path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the file bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Returns cuFile's handle of the file, which is registered by the first caller.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu) with the reason why cuFile does not take it.
    pub(super) fn registered(&self, driver: &CuFileDriver) -> Result<&FileHandle> {
        self.registration
            .get_or_init(|| driver.register_file(self.as_fd()))
            .as_ref()
            .map_err(|error| {
                Error::gpu("register with cuFile", error.clone()).with_path(&self.path)
            })
    }

    /// Returns the length in bytes, `None` for anything but a regular file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
    pub fn regular_bytes(&self) -> Result<Option<u64>> {
        let metadata = self
            .file
            .metadata()
            .map_err(|source| Error::io("stat", &self.path, source))?;
        Ok(metadata.is_file().then_some(metadata.len()))
    }

    /// Writes data and metadata through to the device.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): what was written before may be lost.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|source| Error::io("fsync", &self.path, source))
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
