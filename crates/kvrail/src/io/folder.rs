//! An open directory; what lies in it is reached by name, and no symbolic link is followed.
//!
//! Only the path of the topmost folder is walked as the system walks paths: it is what a user
//! configured. Everything below is opened relative to an open folder, so whoever else may write
//! there can put a symbolic link or another folder in a name's place and lead nobody astray. In
//! one call where the kernel has openat2 (Linux 5.6), else part by part.
//!
//! Handles are kept for one operation and not longer: a directory that was removed, renamed or
//! mounted anew is seen by the next one, and no mount is kept busy.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::observer::{Observer, Step};
use super::permissions::Permissions;
use crate::error::{Error, Result};

/// What holds for a directory and all below it.
#[derive(Debug, Clone, Default)]
pub struct FolderRules {
    /// The bits of what is created.
    pub permissions: Permissions,
    /// Who is told of changes; nobody by default.
    pub observer: Option<Observer>,
}

/// An open directory.
#[derive(Debug)]
pub struct Folder {
    handle: OwnedFd,
    /// For messages; nothing but the topmost folder is opened by it.
    path: PathBuf,
    rules: FolderRules,
}

/// What the system says of a name, a symbolic link not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStatus {
    /// Whether it is a regular file.
    pub is_file: bool,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// Length in bytes.
    pub bytes: u64,
    /// The number that tells files of one file system apart while they exist.
    pub inode: u64,
    /// When its content was changed last.
    pub modified: SystemTime,
}

/// Folders are opened as a place in the tree only, which needs no right to list them.
const PLACE: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW);
const LISTING: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

impl Folder {
    /// Opens the topmost folder, by a path in which symbolic links are followed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn open(path: &Path, rules: FolderRules) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| Error::io("open directory", path, errno.into()))?;
        Ok(Self {
            handle,
            path: path.to_path_buf(),
            rules,
        })
    }

    /// Returns the path for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the folder `below`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error: a symbolic link on the way
    /// is none of a folder.
    pub fn folder(&self, below: impl AsRef<Path>) -> Result<Self> {
        let below = below.as_ref();
        let handle = self
            .open_below(below, PLACE, Mode::empty())
            .map_err(|errno| self.failed("open directory", below, errno))?;
        Ok(self.child(handle, below))
    }

    /// Opens the folder `below` and makes what is missing of it; `sync` makes its names durable.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) or [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace)
    /// with the system's error.
    pub fn make(&self, below: impl AsRef<Path>, sync: bool) -> Result<Self> {
        let below = below.as_ref();
        check(below).map_err(|errno| self.failed("create directory", below, errno))?;
        let mut parent: Option<Self> = None;
        for part in below.iter() {
            let within = parent.as_ref().unwrap_or(self);
            let child = within.make_one(Path::new(part))?;
            if sync {
                // Also when somebody else has just made it and not yet synced.
                within.sync()?;
            }
            parent = Some(child);
        }
        parent.ok_or_else(|| self.failed("create directory", below, Errno::INVAL))
    }

    fn make_one(&self, name: &Path) -> Result<Self> {
        let failed = |errno| self.failed("create directory", name, errno);
        let mode = self.rules.permissions.folder();
        let is_new = match rustix::fs::mkdirat(&self.handle, name, mode) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(failed(errno)),
        };
        let child = self.folder(name)?;
        if is_new {
            set_exact_mode(&child.handle, mode).map_err(failed)?;
            child.tell(&Step::MakeFolder(&child.path));
        }
        Ok(child)
    }

    /// Returns whether anything has the name `below`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
    pub fn holds(&self, below: impl AsRef<Path>) -> Result<bool> {
        let below = below.as_ref();
        let found = if kernel_resolves() {
            // Asked for as a folder, a file is refused before it is opened: one call instead of
            // two, and lookups are nothing but this. access(2) is one, too, but follows links. A
            // file in the place of a folder on the way gives the same answer; opening shows it.
            match self.open_below(below, PLACE, Mode::empty()) {
                Err(Errno::NOTDIR) => return Ok(true),
                Err(Errno::LOOP) => self.open_below(below, OFlags::PATH, Mode::empty()),
                found => found,
            }
        } else {
            self.open_below(below, OFlags::PATH, Mode::empty())
        };
        match found {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
            Err(errno) => Err(self.failed("look up", below, errno)),
        }
    }

    /// Returns what has the name `below`, `None` if nothing has.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
    pub fn status(&self, below: impl AsRef<Path>) -> Result<Option<FileStatus>> {
        let below = below.as_ref();
        let found = self
            .open_below(below, OFlags::PATH, Mode::empty())
            .and_then(rustix::fs::fstat);
        match found {
            Ok(stat) => Ok(Some(FileStatus::of(&stat))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(self.failed("stat", below, errno)),
        }
    }

    /// Gives the name `source` in this folder the name `target` in another; what had that is gone.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) or [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace)
    /// with the system's error.
    pub fn rename(&self, source: &str, folder: &Self, target: &str) -> Result<()> {
        self.rename_with(source, folder, target, RenameFlags::empty())
    }

    /// As [`Folder::rename`], but fails when `target` exists.
    ///
    /// # Errors
    /// As [`Folder::rename`], also on a file system that cannot do it.
    pub fn rename_to_free(&self, source: &str, folder: &Self, target: &str) -> Result<()> {
        self.rename_with(source, folder, target, RenameFlags::NOREPLACE)
    }

    fn rename_with(
        &self,
        source: &str,
        folder: &Self,
        target: &str,
        flags: RenameFlags,
    ) -> Result<()> {
        let to = folder.path.join(target);
        let renamed = check_name(source)
            .and_then(|()| check_name(target))
            .and_then(|()| {
                if flags.is_empty() {
                    rustix::fs::renameat(&self.handle, source, &folder.handle, target)
                } else {
                    rustix::fs::renameat_with(&self.handle, source, &folder.handle, target, flags)
                }
            });
        renamed.map_err(|errno| Error::io("rename to", &to, errno.into()))?;
        let source = &self.path.join(source);
        self.tell(&Step::Rename {
            source,
            target: &to,
        });
        Ok(())
    }

    /// Removes the file `name`; a symbolic link is removed itself.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn remove_file(&self, name: impl AsRef<Path>) -> Result<()> {
        self.remove(name.as_ref(), AtFlags::empty())
    }

    /// Removes the folder `name`, which must be empty.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub fn remove_folder(&self, name: impl AsRef<Path>) -> Result<()> {
        self.remove(name.as_ref(), AtFlags::REMOVEDIR)
    }

    fn remove(&self, name: &Path, flags: AtFlags) -> Result<()> {
        check_name(name)
            .and_then(|()| rustix::fs::unlinkat(&self.handle, name, flags))
            .map_err(|errno| self.failed("remove", name, errno))?;
        self.tell(&Step::Remove(&self.path.join(name)));
        Ok(())
    }

    /// Lists the names in the folder, in no order.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when it cannot be read, at once or on the way.
    pub fn names(&self) -> Result<impl Iterator<Item = Result<OsString>> + use<>> {
        let path = self.path.clone();
        let failed = move |errno: Errno| Error::io("read directory", &path, errno.into());
        let entries = self.open_again().and_then(Dir::new).map_err(&failed)?;
        Ok(entries.filter_map(move |entry| match entry {
            Ok(entry) => {
                let name = entry.file_name().to_bytes();
                let itself = matches!(name, b"." | b"..");
                (!itself).then(|| Ok(OsString::from_vec(name.to_vec())))
            }
            Err(errno) => Some(Err(failed(errno))),
        }))
    }

    /// Makes the names in the folder durable.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io): names that are new may be lost in a power failure.
    pub fn sync(&self) -> Result<()> {
        self.open_again()
            .and_then(rustix::fs::fsync)
            .map_err(|errno| Error::io("fsync directory", &self.path, errno.into()))?;
        self.tell(&Step::SyncFolder(&self.path));
        Ok(())
    }

    /// Tells the observer, if there is one.
    pub(crate) fn tell(&self, step: &Step<'_>) {
        if let Some(observer) = &self.rules.observer {
            observer.tell(step);
        }
    }

    /// Returns the bits of what is created here.
    pub(super) fn permissions(&self) -> Permissions {
        self.rules.permissions
    }

    /// Returns the permissions that the folder itself has, for more of its kind.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
    pub(crate) fn own_permissions(&self) -> Result<Permissions> {
        let stat = rustix::fs::fstat(&self.handle)
            .map_err(|errno| Error::io("stat", &self.path, errno.into()))?;
        Ok(Permissions::of_files(stat.st_mode & 0o666))
    }

    /// Opens `below`; a symbolic link is followed nowhere.
    pub(super) fn open_below(
        &self,
        below: &Path,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        open_below(self.handle.as_fd(), below, flags, mode, kernel_resolves())
    }

    /// Opens the folder itself for listing and syncing, which a mere place does not allow.
    fn open_again(&self) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(&self.handle, ".", LISTING | OFlags::CLOEXEC, Mode::empty())
    }

    fn child(&self, handle: OwnedFd, below: &Path) -> Self {
        Self {
            handle,
            path: self.path.join(below),
            rules: self.rules.clone(),
        }
    }

    fn failed(&self, operation: &str, below: &Path, errno: Errno) -> Error {
        Error::io(operation, &self.path.join(below), errno.into())
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

impl FileStatus {
    pub(super) fn of(stat: &rustix::fs::Stat) -> Self {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let seconds = u64::try_from(stat.st_mtime).unwrap_or_default();
        let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or_default();
        Self {
            is_file: kind == FileType::RegularFile,
            is_folder: kind == FileType::Directory,
            bytes: u64::try_from(stat.st_size).unwrap_or_default(),
            inode: stat.st_ino,
            // What no clock can show (a broken file system) counts as the epoch.
            modified: SystemTime::UNIX_EPOCH
                .checked_add(Duration::new(seconds, nanoseconds.min(999_999_999)))
                .unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

/// Gives an open file or folder exactly `mode`, bits such as setgid aside, if it has not got it.
pub(super) fn set_exact_mode(handle: impl AsFd, mode: Mode) -> Result<(), Errno> {
    const RIGHTS: u32 = 0o777;
    let found = rustix::fs::fstat(&handle)?.st_mode;
    if found & RIGHTS == mode.as_raw_mode() & RIGHTS {
        return Ok(());
    }
    let wanted = Mode::from_raw_mode(found & 0o7000 | mode.as_raw_mode() & RIGHTS);
    // A place cannot be changed by its handle; its name here cannot be anything else.
    match rustix::fs::fchmod(&handle, wanted) {
        Err(Errno::BADF) => {
            let again = rustix::fs::openat(&handle, ".", LISTING | OFlags::CLOEXEC, Mode::empty())?;
            rustix::fs::fchmod(again, wanted)
        }
        result => result,
    }
}

/// Returns an error for what is not a name, or several with `/` between: `..`, `/etc`, nothing.
fn check(below: &Path) -> Result<(), Errno> {
    let mut parts = below.components().peekable();
    if parts.peek().is_none() {
        return Err(Errno::INVAL);
    }
    if parts.all(|part| matches!(part, Component::Normal(_))) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// As `check`, for one name.
fn check_name(name: impl AsRef<Path>) -> Result<(), Errno> {
    let name = name.as_ref();
    check(name)?;
    let one = !name.as_os_str().as_encoded_bytes().contains(&b'/');
    one.then_some(()).ok_or(Errno::INVAL)
}

fn open_below(
    from: BorrowedFd<'_>,
    below: &Path,
    flags: OFlags,
    mode: Mode,
    kernel_resolves: bool,
) -> Result<OwnedFd, Errno> {
    check(below)?;
    let flags = flags | OFlags::CLOEXEC;
    let is_place = flags.contains(OFlags::PATH);
    if kernel_resolves && (!is_place || below.iter().nth(1).is_some()) {
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        // For a file the rules do: O_NOFOLLOW would stay with it, and cuFile refuses such files.
        let nofollow = if is_place {
            OFlags::NOFOLLOW
        } else {
            OFlags::empty()
        };
        return rustix::fs::openat2(from, below, flags | nofollow, mode, rules);
    }
    let flags = flags | OFlags::NOFOLLOW;
    let mut parts = below.iter().peekable();
    let mut within: Option<OwnedFd> = None;
    while let Some(part) = parts.next() {
        let from = within.as_ref().map_or(from, AsFd::as_fd);
        if parts.peek().is_none() {
            return rustix::fs::openat(from, part, flags, mode);
        }
        within = Some(rustix::fs::openat(
            from,
            part,
            PLACE | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
    }
    Err(Errno::INVAL)
}

/// Returns whether openat2 is there; kernels before 5.6 and some sandboxes do not have it.
fn kernel_resolves() -> bool {
    static RESOLVES: OnceLock<bool> = OnceLock::new();
    *RESOLVES.get_or_init(|| {
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(
            CWD,
            ".",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            rules,
        )
        .is_ok()
    })
}

/// Returns whether that is the error for a link to nothing or to itself.
fn leads_nowhere(error: &io::Error) -> bool {
    [Errno::NOENT, Errno::LOOP]
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.raw_os_error())
}

/// Makes the directory that a user configured, and its parents; `sync` makes its name durable.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error, also when a file is in its place.
pub fn make_path(path: &Path, rules: &FolderRules, sync: bool) -> Result<()> {
    let failed = |path: &Path, source| Error::io("create directory", path, source);
    let missing: Vec<&Path> = path.ancestors().take_while(|part| !part.is_dir()).collect();
    let mode = rules.permissions.folder();
    for part in missing.iter().rev() {
        match rustix::fs::mkdir(*part, mode) {
            Ok(()) => {
                let folder = Folder::open(part, rules.clone())?;
                set_exact_mode(&folder, mode).map_err(|errno| failed(part, errno.into()))?;
                folder.tell(&Step::MakeFolder(part));
            }
            // What cannot be looked at is not said to be a file.
            Err(Errno::EXIST) => match std::fs::metadata(part) {
                Ok(found) if found.is_dir() => {}
                Err(source) if !leads_nowhere(&source) => return Err(failed(part, source)),
                _ => return Err(failed(part, io::ErrorKind::NotADirectory.into())),
            },
            Err(errno) => return Err(failed(part, errno.into())),
        }
    }
    if sync {
        let parent_of = |part: &Path| {
            let parent = part.parent().unwrap_or(part);
            Folder::open(parent, rules.clone()).and_then(|folder| folder.sync())
        };
        missing.iter().rev().try_for_each(|part| parent_of(part))?;
        if missing.is_empty() {
            // Its name may be new all the same, made by somebody who has not synced it. A parent
            // that we may not list is one that an administrator made.
            drop(parent_of(path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
