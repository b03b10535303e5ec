//! Whether any process uses a file, as long as it lives.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::byte_lock::{LockKind, try_lock};

/// The byte that is locked, far behind those of slots: nothing is stored there.
const BYTE: u64 = 1 << 62;

/// A hold on a file, given back when dropped or when the process ends, however it does.
#[derive(Debug)]
pub struct FileUse {
    _handle: File,
}

impl FileUse {
    /// Holds a file with others; `None` where somebody has it alone.
    ///
    /// # Errors
    /// The system's, of opening and locking the file.
    pub fn share(file: &File) -> io::Result<Option<Self>> {
        Self::take(file, LockKind::Read)
    }

    /// Holds a file alone; `None` where somebody else holds it.
    ///
    /// # Errors
    /// As [`FileUse::share`].
    pub fn alone(file: &File) -> io::Result<Option<Self>> {
        Self::take(file, LockKind::Write)
    }

    fn take(file: &File, kind: LockKind) -> io::Result<Option<Self>> {
        let handle = reopen(file)?;
        let is_held = try_lock(handle.as_fd(), BYTE, kind)?;
        Ok(is_held.then_some(Self { _handle: handle }))
    }
}

/// Opens a file once more, also when it has no name any more.
pub(super) fn reopen(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_used_by_some_or_by_one_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        let first = FileUse::share(&file).unwrap().unwrap();
        let second = FileUse::share(&file).unwrap().unwrap();
        assert!(FileUse::alone(&file).unwrap().is_none());
        drop(first);
        assert!(FileUse::alone(&file).unwrap().is_none());
        drop(second);
        let alone = FileUse::alone(&file).unwrap().unwrap();
        assert!(FileUse::share(&file).unwrap().is_none());
        drop(alone);
        assert!(FileUse::share(&file).unwrap().is_some());
    }
}
