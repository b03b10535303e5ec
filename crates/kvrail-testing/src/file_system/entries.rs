//! Names in folders: what they stand for, and operations that make or move them.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{Errno, FileHandle, Generation, INodeNo, RenameFlags, ReplyEntry};
use rustix::fs::CWD;

use super::serving::{NOT_AT_ALL, Shared};
use super::{attributes, errno, generation, is_hidden, skew};
use crate::rules::Effect;

impl Shared {
    /// Says what a name stands for after an operation made it.
    pub(super) fn reply_entry(
        &self,
        parent: u64,
        name: &OsStr,
        ttl: Duration,
        skew: i64,
        reply: ReplyEntry,
    ) {
        let found = self.folder.entry(parent, name);
        match found.and_then(|(_, path)| path.symlink_metadata()) {
            Ok(metadata) => {
                let inode = self.folder.remember(parent, name, &metadata);
                let attributes = attributes(inode, &metadata, skew);
                reply.entry(&ttl, &attributes, generation(&metadata));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(super) fn lookup(
        &self,
        parent: u64,
        name: &OsStr,
        effect: Option<Effect>,
        reply: ReplyEntry,
    ) {
        let ttl = match effect {
            Some(Effect::Stale(ttl)) => ttl,
            _ => NOT_AT_ALL,
        };
        let found = self.folder.entry(parent, name);
        match found.and_then(|(_, path)| path.symlink_metadata()) {
            Ok(metadata) if is_hidden(&metadata, effect) => reply.error(Errno::ENOENT),
            Ok(_) => self.reply_entry(parent, name, ttl, skew(effect), reply),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !ttl.is_zero() => {
                // Inode 0 tells the kernel that there is nothing, and for how long that holds.
                let nothing = nothing();
                reply.entry(&ttl, &nothing, Generation(0));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(super) fn metadata(&self, inode: u64, handle: Option<FileHandle>) -> io::Result<Metadata> {
        match handle.map(|handle| self.folder.file(handle.0)) {
            Some(Ok(file)) => file.metadata(),
            _ => self.folder.metadata(inode),
        }
    }

    pub(super) fn make(
        &self,
        parent: u64,
        name: &OsStr,
        reply: ReplyEntry,
        make: impl FnOnce(&Path) -> io::Result<()>,
    ) {
        let made = self.folder.entry(parent, name);
        match made.and_then(|(_, path)| make(&path)) {
            Ok(()) => self.reply_entry(parent, name, NOT_AT_ALL, 0, reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(super) fn rename(
        &self,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
        flags: RenameFlags,
    ) -> io::Result<()> {
        let (_, source) = self.folder.entry(parent, name)?;
        let (_, target) = self.folder.entry(new_parent, new_name)?;
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        rustix::fs::renameat_with(CWD, &source, CWD, &target, flags)?;
        self.folder
            .remember(new_parent, new_name, &target.symlink_metadata()?);
        Ok(())
    }
}

/// Attributes of nothing.
fn nothing() -> fuser::FileAttr {
    fuser::FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
