//! The operations of the file system, as the kernel asks for them.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use rustix::fs::{CWD, Timespec, Timestamps};

use super::control::Control;
use super::folder::{Folder, ROOT};
use super::{attributes, errno, generation, is_hidden, skew};
use crate::rules::{Effect, Fault};

/// How long the kernel believes what it was told: not at all, so that every operation comes here.
const NOT_AT_ALL: Duration = Duration::ZERO;

/// What the operations share.
#[derive(Debug)]
struct Shared {
    folder: Folder,
    control: Control,
}

/// The file system.
#[derive(Debug)]
pub(super) struct FaultFileSystem {
    shared: Arc<Shared>,
}

/// A reply that can say no.
trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyEmpty,
    ReplyEntry,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite
);

/// Ends an operation that gave nothing but success.
fn done(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

impl FaultFileSystem {
    pub(super) fn new(source: &Path, control: &Path, seed: u64) -> io::Result<Self> {
        let shared = Shared {
            folder: Folder::new(source)?,
            control: Control::new(control, seed)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Does an operation, or what the script says instead of it.
    fn serve<R: Refuse>(
        &self,
        operation: &'static str,
        path: io::Result<PathBuf>,
        reply: R,
        work: impl FnOnce(&Shared, &Fault, R) + Send + 'static,
    ) {
        let path = match path {
            Ok(path) => path.to_string_lossy().into_owned(),
            Err(error) => return reply.refuse(errno(&error)),
        };
        let fault = self.shared.control.decide(operation, &path);
        let finish = |shared: &Shared, fault: &Fault, reply: R| match fault.effect {
            Some(Effect::Error(number)) => reply.refuse(Errno::from_i32(number)),
            _ => work(shared, fault, reply),
        };
        if fault.delay.is_zero() && !fault.hang {
            return finish(&self.shared, &fault, reply);
        }
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            shared.control.hold(operation, &path, &fault);
            finish(&shared, &fault, reply);
        });
    }

    fn below(&self, inode: INodeNo) -> io::Result<PathBuf> {
        self.shared.folder.below(inode.0)
    }

    fn entry(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.shared.folder.entry(parent.0, name)?.0)
    }
}

impl Shared {
    /// Says what a name stands for after an operation made it.
    fn reply_entry(&self, parent: u64, name: &OsStr, ttl: Duration, skew: i64, reply: ReplyEntry) {
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

    fn lookup(&self, parent: u64, name: &OsStr, effect: Option<Effect>, reply: ReplyEntry) {
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

    fn metadata(&self, inode: u64, handle: Option<FileHandle>) -> io::Result<Metadata> {
        match handle.map(|handle| self.folder.file(handle.0)) {
            Some(Ok(file)) => file.metadata(),
            _ => self.folder.metadata(inode),
        }
    }

    fn make(
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

    /// Returns how many bytes of a transfer are moved.
    fn moved(bytes: usize, fault: &Fault) -> usize {
        match fault.effect {
            Some(Effect::Short) if bytes > 1 => bytes / 2,
            _ => bytes,
        }
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

fn timespec(time: Option<TimeOrNow>) -> Timespec {
    let (seconds, nanoseconds) = match time {
        None => (0, rustix::fs::UTIME_OMIT),
        Some(TimeOrNow::Now) => (0, rustix::fs::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            (since.as_secs() as i64, i64::from(since.subsec_nanos()))
        }
    };
    Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    }
}

/// What `setattr` shall change.
struct Changes {
    mode: Option<u32>,
    owner: Option<u32>,
    group: Option<u32>,
    bytes: Option<u64>,
    times: Option<Timestamps>,
}

impl Changes {
    fn apply(&self, path: &Path) -> io::Result<()> {
        if let Some(mode) = self.mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        }
        if self.owner.is_some() || self.group.is_some() {
            std::os::unix::fs::lchown(path, self.owner, self.group)?;
        }
        if let Some(bytes) = self.bytes {
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .set_len(bytes)?;
        }
        if let Some(times) = &self.times {
            rustix::fs::utimensat(CWD, path, times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

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
            move |shared, _, reply| {
                let found = shared.folder.entry(parent.0, &owned);
                done(
                    reply,
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
            move |shared, _, reply| {
                let found = shared.folder.entry(parent.0, &owned);
                done(reply, found.and_then(|(_, path)| std::fs::remove_dir(path)));
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
        self.serve("rename", path, reply, move |shared, _, reply| {
            let rename = || -> io::Result<()> {
                let (_, source) = shared.folder.entry(parent.0, &name)?;
                let (_, target) = shared.folder.entry(newparent.0, &new_name)?;
                let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
                rustix::fs::renameat_with(CWD, &source, CWD, &target, flags)?;
                shared
                    .folder
                    .remember(newparent.0, &new_name, &target.symlink_metadata()?);
                Ok(())
            };
            done(reply, rename());
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve("open", self.below(ino), reply, move |shared, _, reply| {
            let open = || -> io::Result<u64> {
                shared.folder.metadata(ino.0)?;
                let path = shared.folder.whole(ino.0)?;
                Ok(shared
                    .folder
                    .keep(shared.folder.open_path(&path, flags.0, 0)?))
            };
            match open() {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                Err(error) => reply.error(errno(&error)),
            }
        });
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
            move |shared, fault, reply| {
                let create = || -> io::Result<(u64, Metadata)> {
                    let (_, path) = shared.folder.entry(parent.0, &owned)?;
                    // O_CREAT, which the kernel does not pass on.
                    let file = shared
                        .folder
                        .open_path(&path, flags | 0o100, mode & !umask)?;
                    let metadata = file.metadata()?;
                    shared.folder.remember(parent.0, &owned, &metadata);
                    Ok((shared.folder.keep(file), metadata))
                };
                match create() {
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
                }
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
            move |shared, fault, reply| {
                let read = || -> io::Result<Vec<u8>> {
                    let file = shared.folder.file(fh.0)?;
                    let mut bytes = vec![0; Shared::moved(size as usize, fault)];
                    let mut filled = 0;
                    while filled < bytes.len() {
                        let count = file.read_at(&mut bytes[filled..], offset + filled as u64)?;
                        if count == 0 {
                            break;
                        }
                        filled += count;
                    }
                    bytes.truncate(filled);
                    if let Some(Effect::Damage(damage)) = fault.effect {
                        damage.apply(&mut bytes, fault.choice);
                    }
                    Ok(bytes)
                };
                match read() {
                    Ok(bytes) => reply.data(&bytes),
                    Err(error) => reply.error(errno(&error)),
                }
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
            move |shared, fault, reply| {
                if let Some(Effect::Damage(damage)) = fault.effect {
                    damage.apply(&mut data, fault.choice);
                }
                let count = Shared::moved(data.len(), fault);
                let written = shared.folder.file(fh.0);
                match written.and_then(|file| file.write_all_at(&data[..count], offset)) {
                    Ok(()) => reply.written(count as u32),
                    Err(error) => reply.error(errno(&error)),
                }
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
        self.serve("fsync", self.below(ino), reply, move |shared, _, reply| {
            done(
                reply,
                shared.folder.file(fh.0).and_then(|file| file.sync_all()),
            );
        });
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
            move |shared, _, reply| {
                let synced = shared.folder.whole(ino.0).and_then(std::fs::File::open);
                done(reply, synced.and_then(|folder| folder.sync_all()));
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
            move |shared, _, reply| {
                let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
                let result = shared.folder.file(fh.0).and_then(|file| {
                    rustix::fs::fallocate(&*file, mode, offset, length).map_err(io::Error::from)
                });
                done(reply, result);
            },
        );
    }
}
