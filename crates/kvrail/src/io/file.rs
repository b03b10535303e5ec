//! An open file with its path, opened so that nothing but a regular file of ours is touched.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvrail_cuda::{CuFileDriver, FileHandle};
use rustix::fs::{Advice, Mode, OFlags, fadvise};
use rustix::io::Errno;
use rustix::param::page_size;

use super::cachestat::cached_pages;
use super::close;
use super::folder::{FileStatus, Folder, set_exact_mode};
use super::observer::Step;
use super::permissions::Permissions;
use super::registered_file::{Refusal, RegisteredFile};
use crate::error::{Error, Result};

/// How to open a chunk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// A file that must not exist yet, for writing; its bits are the folder's, else 0600.
    CreateNew,
}

/// File systems that take the kernel's "do not wait" at its word, by `statfs` magic: ext4, xfs, btrfs.
const PROMPT: [u64; 3] = [0x0000_EF53, 0x5846_5342, 0x9123_683E];

/// An open file and the path it was opened by.
#[derive(Debug)]
pub struct IoFile {
    // Dropped first: cuFile must forget the file before it is closed.
    registration: OnceLock<Result<RegisteredFile, Refusal>>,
    file: File,
    /// The same file once more, through the page cache.
    cached_view: Option<OwnedFd>,
    path: PathBuf,
    direct: bool,
    is_prompt: OnceLock<bool>,
}

impl IoFile {
    /// Opens `path`; `direct` asks for O_DIRECT. Links in front of the last part are followed.
    ///
    /// A symbolic link as the last part of the path is refused, and so is waiting for a FIFO.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn open(path: &Path, mode: OpenMode, direct: bool) -> Result<Self> {
        let bits = Permissions::default().file();
        let opened = rustix::fs::open(path, flags(mode, direct) | OFlags::NOFOLLOW, bits);
        let file = opened.map_err(|errno| Error::io("open", path, errno.into()))?;
        Ok(Self::new(file, path.to_path_buf(), direct))
    }

    /// Opens `below` in a folder, through no symbolic link; `direct` asks for O_DIRECT.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn open_in(
        folder: &Folder,
        below: impl AsRef<Path>,
        mode: OpenMode,
        direct: bool,
    ) -> Result<Self> {
        let path = folder.path().join(&below);
        let failed = |errno: rustix::io::Errno| Error::io("open", &path, errno.into());
        // openat2 takes no bits for what exists.
        let bits = match mode {
            OpenMode::Read => Mode::empty(),
            OpenMode::CreateNew => folder.permissions().file(),
        };
        let file = folder
            .open_below(below.as_ref(), flags(mode, direct), bits)
            .map_err(failed)?;
        if mode == OpenMode::CreateNew {
            set_exact_mode(&file, bits).map_err(failed)?;
            folder.tell(&Step::CreateFile(&path));
        }
        Ok(Self::new(file, path, direct))
    }

    fn new(file: OwnedFd, path: PathBuf, direct: bool) -> Self {
        Self {
            registration: OnceLock::new(),
            file: file.into(),
            cached_view: None,
            path,
            direct,
            is_prompt: OnceLock::new(),
        }
    }

    /// Opens the file once more, for what the page cache has of it.
    ///
    /// A file that is opened direct cannot be read from there. The two views are of one inode, or
    /// there is no second one: the name may belong to another file by now.
    #[must_use]
    pub(super) fn with_cached_view(mut self, folder: &Folder, below: &str) -> Self {
        let flags = flags(OpenMode::Read, false);
        let opened = folder.open_below(below.as_ref(), flags, Mode::empty());
        self.cached_view = opened.ok().filter(|view| {
            let inode = |file: BorrowedFd<'_>| {
                rustix::fs::fstat(file).map(|found| (found.st_dev, found.st_ino))
            };
            let (first, second) = (inode(self.file.as_fd()), inode(view.as_fd()));
            // What goes from the page cache while it is read is not to be read ahead anew.
            first.is_ok() && first == second && fadvise(view, 0, None, Advice::Random).is_ok()
        });
        self
    }

    /// Returns how many bytes of a range the page cache has, up to a page more at either end.
    ///
    /// # Errors
    /// The system's: it tells since Linux 6.5, and those who own the file or may write to it.
    pub fn cached_bytes(&self, offset: u64, bytes: u64) -> Result<u64, Errno> {
        let pages = cached_pages(self.file.as_fd(), offset, bytes)?;
        Ok(bytes.min(pages.saturating_mul(page_size() as u64)))
    }

    /// Returns the view through the page cache, where there is one beside a direct one.
    pub(super) fn cached_view(&self) -> Option<BorrowedFd<'_>> {
        self.cached_view.as_ref().map(AsFd::as_fd)
    }

    /// Returns whether the file system does a direct read or write without waiting, or says that
    /// it cannot. Others wait for their device or server whatever they are asked.
    pub(super) fn is_prompt(&self) -> bool {
        let is_prompt = || {
            let found = rustix::fs::fstatfs(&self.file);
            found.is_ok_and(|found| PROMPT.contains(&(found.f_type as u64 & 0xFFFF_FFFF)))
        };
        self.direct && *self.is_prompt.get_or_init(is_prompt)
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
        let register = || RegisteredFile::new(driver, self.as_fd());
        let registered = self.registration.get_or_init(register).as_ref();
        registered
            .map(RegisteredFile::handle)
            .map_err(|refusal| refusal.to_error(&self.path))
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

    /// Returns what the system says of the open file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when it does not tell.
    pub fn status(&self) -> Result<FileStatus> {
        let found = rustix::fs::fstat(&self.file);
        let found = found.map_err(|errno| Error::io("stat", &self.path, errno.into()))?;
        Ok(FileStatus::of(&found))
    }

    /// Reads a small regular file whole, or its first `bytes_max` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error, and for what is no regular
    /// file.
    pub fn read_bounded(&self, bytes_max: usize) -> Result<Vec<u8>> {
        let failed = |source| Error::io("read", &self.path, source);
        if !self.status()?.is_file {
            return Err(failed(std::io::Error::other("not a regular file")));
        }
        let mut bytes = Vec::new();
        let mut start = (&self.file).take(bytes_max as u64);
        start.read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    /// Reads until the buffer is full.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`](crate::ErrorKind::Damaged) when the file ends before that,
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        super::posix::read_whole(self, offset, buffer)
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

    /// Has the bytes sent, as closing the file does where it is on another machine.
    ///
    /// # Errors
    /// Those of the file system, of writes before, too.
    pub fn send(&self) -> Result<()> {
        close::send(&self.file).map_err(|source| Error::io("close", &self.path, source))
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn flags(mode: OpenMode, direct: bool) -> OFlags {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    flags |= match mode {
        OpenMode::Read => OFlags::RDONLY,
        OpenMode::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
    };
    if direct {
        flags |= OFlags::DIRECT;
    }
    flags
}
