//! How a file becomes visible: temp file, every byte counted, rename.
//!
//! create (exclusive) -> write -> check -> \[fsync\] -> close -> rename -> \[fsync directory\]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoFile, OpenMode};

/// A file that is being written; it vanishes unless it is published.
#[derive(Debug)]
pub(super) struct TemporaryFile {
    path: PathBuf,
    file: Option<Arc<IoFile>>,
}

impl TemporaryFile {
    /// Creates the file; it must not exist.
    pub(super) fn create(path: PathBuf, direct: bool) -> Result<Self> {
        let file = IoFile::open(&path, OpenMode::CreateNew, direct)?;
        Ok(Self {
            path,
            file: Some(Arc::new(file)),
        })
    }

    /// Returns the open file.
    pub(super) fn file(&self) -> Result<&Arc<IoFile>> {
        let closed = || Error::new(ErrorKind::Closed, "temp file").with_path(&self.path);
        self.file.as_ref().ok_or_else(closed)
    }

    /// Makes the file visible as `target`, whole: checks its length, syncs if asked, renames.
    ///
    /// A file that is there already is replaced: its content has the same key.
    pub(super) fn publish(mut self, target: &Path, bytes: u64, sync: bool) -> Result<()> {
        let file = self.file()?;
        let length = file.regular_bytes()?;
        if length != Some(bytes) {
            let message = format!("publish: expected {bytes} bytes, the file has {length:?}");
            return Err(Error::new(ErrorKind::Io, message).with_path(&self.path));
        }
        if sync {
            file.sync()?;
        }
        // Closed before the rename: on network file systems closing is what sends the data.
        self.file = None;
        rename_into(&self.path, target)?;
        if sync {
            sync_directory(target.parent().unwrap_or(target))?;
        }
        // Nothing is left at the temp path: dropping has nothing to remove.
        self.path = PathBuf::new();
        Ok(())
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // Failing here (a read-only or vanished mount) leaves a leftover for the next clean-up.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// Renames, making the target's folder when it is not there yet.
fn rename_into(source: &Path, target: &Path) -> Result<()> {
    let failed = |error| Error::io("rename to", target, error);
    match std::fs::rename(source, target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            super::directory::create_directory(target.parent().unwrap_or(target))?;
            std::fs::rename(source, target).map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// Writes a directory's entries through to the device.
fn sync_directory(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|source| Error::io("fsync directory", path, source))
}

/// Writes a small file whole and publishes it.
pub(super) fn publish_bytes(
    temporary: PathBuf,
    target: &Path,
    bytes: &[u8],
    sync: bool,
) -> Result<()> {
    let file = TemporaryFile::create(temporary, false)?;
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(&**file.file()?, rest, done as u64) {
            Ok(count) if count > 0 => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Err(Error::new(ErrorKind::Io, "write of 0 bytes").with_path(target)),
            Err(errno) => return Err(Error::io("write", target, errno.into())),
        }
    }
    file.publish(target, bytes.len() as u64, sync)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unpublished_file_vanishes_and_a_short_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".t");
        drop(TemporaryFile::create(path.clone(), false).unwrap());
        assert!(!path.exists());
        let file = TemporaryFile::create(path.clone(), false).unwrap();
        let target = folder.path().join("x/target");
        assert!(file.publish(&target, 1, false).is_err());
        assert!(!path.exists() && !target.exists());
    }

    #[test]
    fn publishing_makes_the_folder_and_replaces() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/target");
        for content in [&b"one"[..], b"other"] {
            publish_bytes(folder.path().join(".t"), &target, content, true).unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), content);
        }
        assert!(!folder.path().join(".t").exists());
    }
}
