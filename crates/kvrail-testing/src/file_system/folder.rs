//! The folder behind the file system: which inode has which path, and what is open.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::FileType;
use rustix::fs::{Mode, OFlags};

/// The inode number of the root, which FUSE gives.
pub(super) const ROOT: u64 = 1;
/// Folders in folders; a path is longer only where something forms a cycle.
const DEPTH_MAX: usize = 64;

/// An entry of a folder: inode number, kind, name.
pub(super) type Entry = (u64, FileType, OsString);

/// The folder, its known inodes and its open files.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    nodes: Mutex<HashMap<u64, (u64, OsString)>>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    last: u64,
    files: HashMap<u64, Arc<File>>,
    listings: HashMap<u64, Vec<Entry>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error(number: rustix::io::Errno) -> io::Error {
    number.into()
}

impl Folder {
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        Ok(Self {
            root: root.canonicalize()?,
            nodes: Mutex::default(),
            open: Mutex::default(),
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of an inode below the root.
    pub(super) fn below(&self, inode: u64) -> io::Result<PathBuf> {
        let nodes = lock(&self.nodes);
        let mut names = Vec::new();
        let mut inode = inode;
        while inode != ROOT {
            let (parent, name) = nodes
                .get(&inode)
                .filter(|_| names.len() < DEPTH_MAX)
                .ok_or_else(|| error(rustix::io::Errno::STALE))?;
            names.push(name.as_os_str());
            inode = *parent;
        }
        Ok(names.into_iter().rev().collect())
    }

    /// Returns the path of a name in a folder: below the root, and whole.
    pub(super) fn entry(&self, parent: u64, name: &OsStr) -> io::Result<(PathBuf, PathBuf)> {
        let below = self.below(parent)?.join(name);
        let whole = self.root.join(&below);
        Ok((below, whole))
    }

    /// Returns what is at an inode's path, if it is still that inode.
    pub(super) fn metadata(&self, inode: u64) -> io::Result<Metadata> {
        let metadata = std::fs::symlink_metadata(self.whole(inode)?)?;
        if inode != ROOT && metadata.ino() != inode {
            return Err(error(rustix::io::Errno::STALE));
        }
        Ok(metadata)
    }

    /// Returns the whole path of an inode.
    pub(super) fn whole(&self, inode: u64) -> io::Result<PathBuf> {
        Ok(self.root.join(self.below(inode)?))
    }

    /// Notes where an inode is.
    pub(super) fn remember(&self, parent: u64, name: &OsStr, metadata: &Metadata) -> u64 {
        let inode = metadata.ino();
        lock(&self.nodes).insert(inode, (parent, name.to_owned()));
        inode
    }

    /// Opens a path. Always through the page cache of the folder: its own file system may have
    /// other rules for O_DIRECT than this one.
    pub(super) fn open_path(&self, path: &Path, flags: i32, mode: u32) -> io::Result<File> {
        let flags = OFlags::from_bits_retain(flags as u32) - OFlags::DIRECT;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(mode);
        Ok(rustix::fs::open(path, flags, mode).map_err(error)?.into())
    }

    /// Keeps an open file and returns its handle.
    pub(super) fn keep(&self, file: File) -> u64 {
        let mut open = lock(&self.open);
        open.last += 1;
        let handle = open.last;
        open.files.insert(handle, Arc::new(file));
        handle
    }

    /// Returns an open file.
    pub(super) fn file(&self, handle: u64) -> io::Result<Arc<File>> {
        let open = lock(&self.open);
        let file = open.files.get(&handle).cloned();
        file.ok_or_else(|| error(rustix::io::Errno::BADF))
    }

    /// Forgets an open file or folder.
    pub(super) fn release(&self, handle: u64) {
        let mut open = lock(&self.open);
        open.listings.remove(&handle);
        let file = open.files.remove(&handle);
        drop(open);
        drop(file);
    }

    /// Makes a handle for an open folder, whose entries come with the first listing.
    pub(super) fn open_folder(&self) -> u64 {
        let mut open = lock(&self.open);
        open.last += 1;
        open.last
    }

    /// Returns the entries of an open folder from `offset`, read anew at its beginning.
    pub(super) fn list(
        &self,
        inode: u64,
        handle: u64,
        offset: usize,
        is_hidden: impl Fn(&Metadata) -> bool,
    ) -> io::Result<Vec<Entry>> {
        if offset == 0 {
            let mut entries: Vec<Entry> = vec![
                (inode, FileType::Directory, ".".into()),
                (inode, FileType::Directory, "..".into()),
            ];
            for entry in std::fs::read_dir(self.whole(inode)?)? {
                let entry = entry?;
                // Gone meanwhile: as if it had not been listed.
                let Ok(metadata) = entry.path().symlink_metadata() else {
                    continue;
                };
                if !is_hidden(&metadata) {
                    let kind = super::kind(metadata.file_type());
                    entries.push((metadata.ino(), kind, entry.file_name()));
                }
            }
            lock(&self.open).listings.insert(handle, entries);
        }
        let open = lock(&self.open);
        let entries = open.listings.get(&handle).map(Vec::as_slice);
        Ok(entries
            .and_then(|entries| entries.get(offset..))
            .unwrap_or_default()
            .to_vec())
    }
}
