//! The operations of the file system, as the kernel asks for them.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::Timestamps;

use super::changes::{Changes, timespec};
use super::folder::ROOT;
use super::serving::{FaultFileSystem, NOT_AT_ALL, done};
use super::{attributes, errno, generation, is_hidden, skew};

impl Filesystem for FaultFileSystem {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // As many as there may be threads, so that one that hangs never keeps others from asking.
        let _ = config.set_max_background(512);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let owned = name.to_owned();
        self.serve(
            "lookup",
            self.entry(parent, name),
            reply,
            move |shared, fault, reply| {
                shared.lookup(parent.0, &owned, fault.effect, reply);
            },
        );
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve(
            "getattr",
            self.below(ino),
            reply,
            move |shared, fault, reply| match shared.metadata(ino.0, fh) {
                Ok(metadata) => {
                    let attributes = attributes(ino.0, &metadata, skew(fault.effect));
                    reply.attr(&NOT_AT_ALL, &attributes);
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let has_times = atime.is_some() || mtime.is_some();
        let changes = Changes {
            mode,
            owner: uid,
            group: gid,
            bytes: size,
            times: has_times.then(|| Timestamps {
                last_access: timespec(atime),
                last_modification: timespec(mtime),
            }),
        };
        self.serve(
            "setattr",
            self.below(ino),
            reply,
            move |shared, fault, reply| {
                let changed = shared
                    .folder
                    .whole(ino.0)
                    .and_then(|path| changes.apply(&path));
                match changed.and_then(|()| shared.metadata(ino.0, fh)) {
                    Ok(metadata) => {
                        let attributes = attributes(ino.0, &metadata, skew(fault.effect));
                        reply.attr(&NOT_AT_ALL, &attributes);
                    }
                    Err(error) => reply.error(errno(&error)),
                }
            },
        );
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve(
            "readlink",
            self.below(ino),
            reply,
            move |shared, _, reply| match shared.folder.whole(ino.0).and_then(std::fs::read_link) {
                Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let owned = name.to_owned();
        self.serve(
            "mkdir",
            self.entry(parent, name),
            reply,
            move |shared, _, reply| {
                let mode = rustix::fs::Mode::from_raw_mode(mode & !umask);
                shared.make(parent.0, &owned, reply, |path| {
                    Ok(rustix::fs::mkdir(path, mode)?)
                });
            },
        );
    }

    fn symlink(
        &self,
        _: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (owned, target) = (link_name.to_owned(), target.to_owned());
        self.serve(
            "symlink",
            self.entry(parent, link_name),
            reply,
            move |shared, _, reply| {
                shared.make(parent.0, &owned, reply, |path| {
                    std::os::unix::fs::symlink(target, path)
                });
            },
        );
    }

    fn link(
        &self,
        _: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let owned = newname.to_owned();
        self.serve(
            "link",
            self.entry(newparent, newname),
            reply,
            move |shared, _, reply| {
                let source = shared.folder.whole(ino.0);
                shared.make(newparent.0, &owned, reply, |path| {
                    std::fs::hard_link(source?, path)
                });
            },
        );
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let owned = name.to_owned();
        self.serve(
            "unlink",
            self.entry(parent, name),
            reply,
            move |shared, fault, reply| {
                let found = shared.folder.entry(parent.0, &owned);
                done(
                    reply,
                    fault,
                    found.and_then(|(_, path)| std::fs::remove_file(path)),
                );
            },
        );
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let owned = name.to_owned();
        self.serve(
            "rmdir",
            self.entry(parent, name),
            reply,
            move |shared, fault, reply| {
                let found = shared.folder.entry(parent.0, &owned);
                done(
                    reply,
                    fault,
                    found.and_then(|(_, path)| std::fs::remove_dir(path)),
                );
            },
        );
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.to_owned(), newname.to_owned());
        // Known by its new name: what a rule is about is the chunk, not the temp file.
        let path = self.entry(newparent, newname);
        self.serve("rename", path, reply, move |shared, fault, reply| {
            let renamed = shared.rename((parent.0, &name), (newparent.0, &new_name), flags);
            done(reply, fault, renamed);
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve(
            "open",
            self.below(ino),
            reply,
            move |shared, _, reply| match shared.open(ino.0, flags.0) {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let owned = name.to_owned();
        self.serve(
            "create",
            self.entry(parent, name),
            reply,
            move |shared, fault, reply| match shared.create(parent.0, &owned, flags, mode & !umask)
            {
                Ok((handle, metadata)) => {
                    let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
                    let attributes = attributes(inode, &metadata, skew(fault.effect));
                    let flags = FopenFlags::FOPEN_DIRECT_IO;
                    let handle = FileHandle(handle);
                    reply.created(
                        &NOT_AT_ALL,
                        &attributes,
                        generation(&metadata),
                        handle,
                        flags,
                    );
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve(
            "read",
            self.below(ino),
            reply,
            move |shared, fault, reply| match shared.read(fh.0, offset, size as usize, fault) {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut data = data.to_vec();
        self.serve(
            "write",
            self.below(ino),
            reply,
            move |shared, fault, reply| match shared.write(fh.0, offset, &mut data, fault) {
                Ok(count) => reply.written(count as u32),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn flush(&self, _: &Request, ino: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.serve("flush", self.below(ino), reply, |_, _, reply| reply.ok());
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // The path may be gone; the handle is released whatever happens to the reply.
        let path = self.below(ino).or_else(|_| Ok(PathBuf::new()));
        self.serve("release", path, reply, move |shared, _, reply| {
            shared.folder.release(fh.0);
            reply.ok();
        });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.serve(
            "fsync",
            self.below(ino),
            reply,
            move |shared, fault, reply| {
                done(
                    reply,
                    fault,
                    shared.folder.file(fh.0).and_then(|file| file.sync_all()),
                );
            },
        );
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.serve("opendir", self.below(ino), reply, |shared, _, reply| {
            reply.opened(FileHandle(shared.folder.open_folder()), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let (path, ino, fh) = (self.below(ino), ino.0, fh.0);
        self.serve("readdir", path, reply, move |shared, fault, mut reply| {
            let entries = shared.folder.list(ino, fh, offset as usize, |metadata| {
                is_hidden(metadata, fault.effect)
            });
            match entries {
                Ok(entries) => {
                    for (index, (inode, kind, name)) in entries.into_iter().enumerate() {
                        let next = offset + index as u64 + 1;
                        if reply.add(INodeNo(inode), next, kind, &name) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.shared.folder.release(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(
            "fsyncdir",
            self.below(ino),
            reply,
            move |shared, fault, reply| {
                let synced = shared.folder.whole(ino.0).and_then(std::fs::File::open);
                done(reply, fault, synced.and_then(|folder| folder.sync_all()));
            },
        );
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let path = self.below(INodeNo(ROOT));
        self.serve(
            "statfs",
            path,
            reply,
            |shared, _, reply| match rustix::fs::statvfs(shared.folder.root()) {
                Ok(found) => reply.statfs(
                    found.f_blocks,
                    found.f_bfree,
                    found.f_bavail,
                    found.f_files,
                    found.f_ffree,
                    found.f_bsize as u32,
                    found.f_namemax as u32,
                    found.f_frsize as u32,
                ),
                Err(number) => reply.error(Errno::from_i32(number.raw_os_error())),
            },
        );
    }

    fn access(&self, _: &Request, ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        self.serve("access", self.below(ino), reply, |_, _, reply| reply.ok());
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve(
            "fallocate",
            self.below(ino),
            reply,
            move |shared, fault, reply| {
                let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
                let result = shared.folder.file(fh.0).and_then(|file| {
                    rustix::fs::fallocate(&*file, mode, offset, length).map_err(io::Error::from)
                });
                done(reply, fault, result);
            },
        );
    }
}
