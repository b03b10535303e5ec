//! A FUSE file system that passes everything on to a folder, except for what the script says.
//!
//! Every operation reaches it: nothing is cached by the kernel unless a rule says so, and files
//! bypass the page cache. An operation that is delayed or hangs does so on a thread of its own, so
//! all others go on. A process that waits for one that hangs cannot be killed, as on a network
//! mount whose server is gone; the end of this file system's process ends all such waits.

mod changes;
mod contents;
mod control;
mod entries;
mod folder;
mod operations;
mod serving;

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileType, Generation, INodeNo, MountOption, Session, SessionACL,
};

use crate::rules::Effect;
use serving::FaultFileSystem;

/// Mounts the file system and serves it until it is unmounted; `ready` runs once it is there.
///
/// # Errors
/// When it cannot be mounted, for want of `/dev/fuse` or of rights.
pub fn serve(
    source: &Path,
    mount_point: &Path,
    control: &Path,
    seed: u64,
    ready: impl FnOnce(),
) -> io::Result<()> {
    let mut options = Config::default();
    options.mount_options = vec![
        MountOption::FSName("fault-fs".into()),
        MountOption::Subtype("fault".into()),
        MountOption::NoDev,
        MountOption::NoSuid,
    ];
    options.acl = SessionACL::All;
    let file_system = FaultFileSystem::new(source, control, seed)?;
    let session = Session::new(file_system, mount_point, &options)?;
    ready();
    session.run()
}

/// Returns what the kernel is told about a file.
fn attributes(inode: u64, metadata: &Metadata, skew: i64) -> FileAttr {
    let time = |seconds: i64, nanoseconds: i64| shifted(seconds + skew, nanoseconds);
    FileAttr {
        ino: INodeNo(inode),
        size: metadata.size(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind: kind(metadata.file_type()),
        perm: (metadata.mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: metadata.rdev() as u32,
        blksize: 4096,
        flags: 0,
    }
}

fn shifted(seconds: i64, nanoseconds: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let start = if seconds < 0 {
        UNIX_EPOCH - whole
    } else {
        UNIX_EPOCH + whole
    };
    start + Duration::from_nanos(nanoseconds.unsigned_abs())
}

fn kind(kind: std::fs::FileType) -> FileType {
    if kind.is_dir() {
        FileType::Directory
    } else if kind.is_symlink() {
        FileType::Symlink
    } else if kind.is_fifo() {
        FileType::NamedPipe
    } else if kind.is_socket() {
        FileType::Socket
    } else {
        FileType::RegularFile
    }
}

/// Returns what tells a file from an earlier one that had the same inode number.
fn generation(metadata: &Metadata) -> Generation {
    let born = metadata.created().ok();
    let born = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    Generation(born.map_or(0, |born| born.as_nanos() as u64))
}

/// Returns whether a file changed so lately that an effect hides it.
fn is_hidden(metadata: &Metadata, effect: Option<Effect>) -> bool {
    let Some(Effect::Late(delay)) = effect else {
        return false;
    };
    let changed = shifted(metadata.ctime(), metadata.ctime_nsec());
    let age = SystemTime::now().duration_since(changed);
    age.unwrap_or_default() < delay
}

fn skew(effect: Option<Effect>) -> i64 {
    match effect {
        Some(Effect::Skew(seconds)) => seconds,
        _ => 0,
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(5))
}
