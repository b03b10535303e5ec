//! Mounts: what `/proc/self/mountinfo` says of a directory.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};

use super::view::SystemView;

/// A device's number, displayed as `259:0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// The kind of device; 0 for file systems without one.
    pub major: u32,
    /// Which of its kind.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

/// A mounted file system (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The directory that it is mounted on.
    pub mount_point: PathBuf,
    /// The device.
    pub device: DeviceNumber,
    /// The file system's name, as `ext4`, `nfs4`, `fuse.sshfs`.
    pub file_system: String,
    /// What is mounted, as the file system names it: a device, `host:/path`, `tmpfs`.
    pub source: String,
    /// Options of the mount, separated by commas.
    pub options: String,
    /// Options of the file system itself, separated by commas.
    pub super_options: String,
    id: u64,
    parent: u64,
}

impl Mount {
    /// Lists the mounts that this process sees.
    pub fn list(view: &SystemView) -> Vec<Self> {
        let bytes = view.bytes("/proc/self/mountinfo").unwrap_or_default();
        bytes
            .split(|byte| *byte == b'\n')
            .filter_map(parse)
            .collect()
    }

    /// Finds the mount that an absolute path without symbolic links lies on.
    ///
    /// Touches nothing but the list of mounts, so it answers for a mount that hangs, too.
    pub fn of(view: &SystemView, path: &Path) -> Option<Self> {
        let mounts = Self::list(view);
        // The root is the mount at `/` that is not mounted upon another one at `/`.
        let at_root = || {
            mounts
                .iter()
                .filter(|mount| mount.mount_point == Path::new("/"))
        };
        let root = at_root().find(|mount| !at_root().any(|other| other.id == mount.parent));
        let Some(mut current) = root else {
            // A chroot whose root is no mount: the deepest mount point is all there is to go by.
            let above = mounts
                .iter()
                .filter(|mount| path.starts_with(&mount.mount_point));
            return above
                .max_by_key(|mount| mount.mount_point.as_os_str().len())
                .cloned();
        };
        // Down the path as the kernel goes: at each directory to what is mounted there on top, so
        // that mounts hidden below another one are not found. Each step goes to a child; the bound
        // ends a list that is not a tree.
        let mut steps_left = mounts.len();
        let ancestors: Vec<&Path> = path.ancestors().collect();
        for directory in ancestors.into_iter().rev() {
            let child = |current: &Self| {
                mounts.iter().find(|mount| {
                    mount.parent == current.id
                        && mount.id != current.id
                        && mount.mount_point == directory
                })
            };
            while let Some(next) = child(current).filter(|_| steps_left > 0) {
                current = next;
                steps_left -= 1;
            }
        }
        Some(current.clone())
    }

    /// Returns whether one of the options, of the mount or of the file system, is `option`.
    pub fn has_option(&self, option: &str) -> bool {
        let all = self.options.split(',').chain(self.super_options.split(','));
        all.into_iter().any(|found| found == option)
    }

    /// Returns the file system's name without what a FUSE file system appends.
    pub(super) fn family(&self) -> &str {
        self.file_system.split('.').next().unwrap_or_default()
    }
}

/// Parses a line; `None` for one that is not as the manual says.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
    let text = |field: &[u8]| unescape(field).to_string_lossy().into_owned();
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let _root = fields.next()?;
    let mount_point = PathBuf::from(unescape(fields.next()?));
    let options = text(fields.next()?);
    // Optional fields end with a single hyphen.
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        mount_point,
        device: DeviceNumber {
            major: device.0.parse().ok()?,
            minor: device.1.parse().ok()?,
        },
        file_system: Some(text(fields.next()?)).filter(|name| !name.is_empty())?,
        source: fields.next().map(text).unwrap_or_default(),
        options,
        super_options: fields.next().map(text).unwrap_or_default(),
        id,
        parent,
    })
}

/// Turns `\040` and the like back into the bytes they stand for.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// What O_DIRECT asks for, in bytes; 0 where it is not possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectIoAlignment {
    /// Addresses of buffers are a multiple of this.
    pub memory_bytes: u32,
    /// Offsets in the file, and lengths, are a multiple of this.
    pub offset_bytes: u32,
}

/// Asks which alignment O_DIRECT needs on a regular file (`STATX_DIOALIGN`).
///
/// `None` where kernel (before 6.1) or file system do not tell.
///
/// # Errors
/// What `statx` said.
pub fn direct_io_alignment(file: impl AsFd) -> io::Result<Option<DirectIoAlignment>> {
    let wanted = StatxFlags::DIOALIGN;
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    let told = StatxFlags::from_bits_retain(found.stx_mask).contains(wanted);
    Ok(told.then_some(DirectIoAlignment {
        memory_bytes: found.stx_dio_mem_align,
        offset_bytes: found.stx_dio_offset_align,
    }))
}
