//! How a file becomes visible: temp file, every byte counted, rename.
//!
//! create (exclusive) -> write -> check -> fsync or send -> close -> rename -> \[fsync directory\]
//!
//! With `durability: full` a chunk is acknowledged when nothing of it can be lost: its bytes were
//! synced before its name existed, then the folder with the name, and before that the folder's own
//! name in its parents (see [`SyncedFolders`](super::durable::SyncedFolders)).

use std::sync::Arc;

use super::directory::{Location, NamespaceDirectory, TEMPORARY_NAME};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, IoFile, OpenMode, Step};

/// A file that is being written; it vanishes unless it is published.
#[derive(Debug)]
pub(super) struct TemporaryFile {
    directory: NamespaceDirectory,
    namespace: Folder,
    folder: Folder,
    /// Empty when the file has another name by now.
    name: String,
    file: Option<Arc<IoFile>>,
    /// The room that it is to have.
    bytes: u64,
    /// Its number, while it is being renamed.
    renaming: Option<u64>,
}

impl TemporaryFile {
    /// Creates the file for `bytes`; it must not exist.
    pub(super) fn create(
        directory: &NamespaceDirectory,
        name: String,
        direct: bool,
        bytes: u64,
    ) -> Result<Self> {
        let namespace = directory.open()?;
        let folder = namespace.folder(TEMPORARY_NAME)?;
        // Begun before the file is there: what a file system creates and says it did not, goes, too.
        let mut temporary = Self {
            directory: directory.clone(),
            namespace,
            folder,
            name,
            file: None,
            bytes,
            renaming: None,
        };
        let file = IoFile::open_in(
            &temporary.folder,
            &temporary.name,
            OpenMode::CreateNew,
            direct,
        )?;
        temporary.file = Some(Arc::new(file));
        Ok(temporary)
    }

    /// Returns the open file.
    pub(super) fn file(&self) -> Result<&Arc<IoFile>> {
        self.file.as_ref().ok_or_else(|| {
            let path = self.folder.path().join(&self.name);
            Error::new(ErrorKind::Closed, "temp file").with_path(&path)
        })
    }

    /// Makes the file visible at `location`, whole: checks its length, syncs if asked, renames.
    ///
    /// A file that is there already is replaced: its content has the same key.
    pub(super) fn publish(mut self, location: &Location, bytes: u64, sync: bool) -> Result<()> {
        let file = self.file()?;
        let status = file.status()?;
        if !status.is_file || status.bytes != bytes {
            let found = status.bytes;
            let message = format!("publish: expected {bytes} bytes, the file has {found}");
            return Err(Error::new(ErrorKind::Io, message).with_path(file.path()));
        }
        if sync {
            file.sync()?;
            self.folder.tell(&Step::SyncFile(file.path()));
        } else {
            // What was written may only now turn out to have no room.
            file.send()?;
        }
        // Closed before the rename, too: others must not find a file that is being written.
        self.file = None;
        self.renaming = Some(status.inode);
        match &location.folder {
            None => {
                self.rename_to(&self.namespace, &location.name)?;
                self.name.clear();
                if sync {
                    self.namespace.sync()?;
                }
            }
            Some(below) => {
                let target = self.rename_into(below, &location.name, sync)?;
                self.name.clear();
                if sync {
                    target.sync()?;
                    self.directory.synced.ensure(
                        &self.directory,
                        &self.namespace,
                        below,
                        &target,
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Renames into a folder of the namespace, making it when it is not there yet.
    fn rename_into(&self, below: &str, name: &str, sync: bool) -> Result<Folder> {
        let existing = self.namespace.folder(below).and_then(|folder| {
            self.rename_to(&folder, name)?;
            Ok(folder)
        });
        match existing {
            Err(error) if is_missing(&error) => {
                let folder = self.namespace.make(below, sync)?;
                self.rename_to(&folder, name)?;
                Ok(folder)
            }
            result => result,
        }
    }

    /// Renames. What a file system did and says it did not, as one that is asked twice by its
    /// network does, is done.
    fn rename_to(&self, folder: &Folder, name: &str) -> Result<()> {
        let error = match self.folder.rename(&self.name, folder, name) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let found = folder.status(name).ok().flatten();
        let is_done = found.is_some_and(|found| Some(found.inode) == self.renaming);
        if is_done { Ok(()) } else { Err(error) }
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if self.name.is_empty() {
            return;
        }
        let lingering = &self.directory.lingering;
        match self.folder.remove_file(&self.name) {
            Ok(()) => {}
            Err(error) if !is_missing(&error) => {
                lingering.add(std::mem::take(&mut self.name), self.bytes);
            }
            // Renamed, perhaps, and nobody could say so.
            Err(_) if self.renaming.is_some() => lingering.add_unknown(self.bytes),
            Err(_) => {}
        }
    }
}

/// Returns whether the system says that a name, or a folder on the way to it, is not there.
pub(super) fn is_missing(error: &Error) -> bool {
    error
        .os_error()
        .is_some_and(|source| source.kind() == std::io::ErrorKind::NotFound)
}

/// Returns whether a file is not there any more: one that was evicted while it was open is stale on
/// a network file system.
pub(super) fn is_gone(error: &Error) -> bool {
    let is_stale = |source: &std::io::Error| {
        source.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error())
    };
    is_missing(error) || error.os_error().is_some_and(is_stale)
}

/// Writes a small file whole and publishes it.
pub(super) fn publish_bytes(
    directory: &NamespaceDirectory,
    temporary: String,
    location: &Location,
    bytes: &[u8],
    sync: bool,
) -> Result<()> {
    let temporary = TemporaryFile::create(directory, temporary, false, bytes.len() as u64)?;
    let file = temporary.file()?;
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(&**file, rest, done as u64) {
            Ok(count) if count > 0 => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                return Err(Error::new(ErrorKind::Io, "write of 0 bytes").with_path(file.path()));
            }
            Err(errno) => return Err(Error::io("write", file.path(), errno.into())),
        }
    }
    temporary.folder.tell(&Step::WriteFile {
        path: file.path(),
        offset: 0,
        bytes,
    });
    temporary.publish(location, bytes.len() as u64, sync)
}

#[cfg(test)]
mod tests {
    use super::super::Namespace;
    use super::*;

    fn directory(root: &std::path::Path) -> NamespaceDirectory {
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(root, &namespace);
        let made = directory.make(false).unwrap();
        made.make(TEMPORARY_NAME, false).unwrap();
        directory
    }

    fn location() -> Location {
        Location {
            folder: Some("x/y".into()),
            name: "target".into(),
        }
    }

    #[test]
    fn an_unpublished_file_vanishes_and_a_short_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = directory(root.path());
        let path = directory.path().join("tmp/.t");
        let create = || TemporaryFile::create(&directory, ".t".into(), false, 5).unwrap();
        let file = create();
        assert!(path.exists());
        drop(file);
        assert!(!path.exists());
        assert!(create().publish(&location(), 1, false).is_err());
        assert!(!path.exists() && !directory.path().join("x").exists());
    }

    #[test]
    fn publishing_makes_the_folder_and_replaces() {
        let root = tempfile::tempdir().unwrap();
        let directory = directory(root.path());
        for content in [&b"one"[..], b"other"] {
            publish_bytes(&directory, ".t".into(), &location(), content, true).unwrap();
            let found = std::fs::read(directory.path().join(location().below())).unwrap();
            assert_eq!(found, content);
        }
        assert!(!directory.path().join("tmp/.t").exists());
    }

    #[test]
    fn nothing_is_published_through_a_link() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let directory = directory(root.path());
        std::os::unix::fs::symlink(outside.path(), directory.path().join("x")).unwrap();
        assert!(publish_bytes(&directory, ".t".into(), &location(), b"one", false).is_err());
        std::fs::remove_dir(directory.path().join("tmp")).unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("tmp")).unwrap();
        assert!(TemporaryFile::create(&directory, ".t".into(), false, 5).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
