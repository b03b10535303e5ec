//! The file of a segment: found or made in a folder of a tmpfs, and removed when its time is over.
//!
//! A segment has a name made of what its chunks have in common, and outlives those who use it. Each
//! of them holds it as long as it lives, so whoever makes a new segment knows which of the others
//! nobody uses, and removes them: memory does not fill up with what the models of last week left.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::segment::{Arrangement, Segment};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{FileUse, SharedSlots};

/// The first word of a segment.
const MAGIC: u64 = u64::from_le_bytes(*b"kvrailsg");
/// Changes with what a segment's words mean.
const VERSION: u64 = 1;
/// Words of the header that mean something: magic, version, bytes of a slot, sets, ways.
const USED_WORDS: usize = 5;
/// What the names of segments end with.
const ENDING: &str = ".segment";
/// How often a segment that another process makes or removes at this moment is looked for again.
const ATTEMPTS: usize = 100;
/// What a tmpfs says it is (linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A segment, and the hold that tells others that it is in use.
#[derive(Debug)]
pub(in crate::store) struct OpenSegment {
    pub(super) segment: Segment,
    /// Bytes of its slots.
    pub(in crate::store) slots_total: usize,
    _in_use: FileUse,
}

/// Makes the folder of segments if it is not there, and checks that `bytes` of segments can be in
/// it, and that nobody else can put anything there.
///
/// # Errors
/// What is expected of it instead, as the end of a sentence.
pub(in crate::store) fn check_folder(folder: &Path, bytes: usize) -> Result<(), String> {
    let unusable = |errno| {
        let error = io::Error::from(errno);
        format!("a directory that can be made or opened ({error})")
    };
    match rustix::fs::mkdir(folder, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(unusable(errno)),
    }
    let place = open_folder(folder).map_err(unusable)?;
    let status = rustix::fs::fstat(&place).map_err(unusable)?;
    let is_ours = status.st_uid == rustix::process::geteuid().as_raw();
    if !is_ours || status.st_mode & 0o022 != 0 {
        let expected = "a directory that belongs to this user and that nobody else can write to";
        return Err(expected.to_owned());
    }
    let system = rustix::fs::fstatfs(&place).map_err(unusable)?;
    if system.f_type as u64 != TMPFS_MAGIC {
        return Err("a directory on a tmpfs, such as /dev/shm/kvrail".to_owned());
    }
    let size = (system.f_bsize as u64).saturating_mul(system.f_blocks);
    // One without a limit says 0.
    if size > 0 && bytes as u64 > size {
        return Err(format!(
            "a directory on a tmpfs no smaller than max_local_cpu_size; this one has {:.3} GB (containers: --shm-size)",
            size as f64 / 1e9
        ));
    }
    Ok(())
}

/// Opens the segment of `name`, or makes one of up to `bytes` bytes of slots (but one slot at least).
///
/// One that others use is taken as it is, also with another number of slots. One that nobody uses
/// and that is not as asked for is made anew.
///
/// # Errors
/// [`ErrorKind::Io`] with the file's path.
pub(super) fn open(
    folder: &Path,
    name: &str,
    slot_bytes: usize,
    bytes: usize,
) -> Result<OpenSegment> {
    let name = format!("{name}{ENDING}");
    let path = folder.join(&name);
    let failed = |error: io::Error| Error::io("open memory shared by processes", &path, error);
    let slots = bytes.checked_div(slot_bytes).unwrap_or(0).max(1);
    let wanted = Arrangement::of(slots, slot_bytes);
    let place = open_folder(folder).map_err(|errno| failed(errno.into()))?;
    for _ in 0..ATTEMPTS {
        let file = match open_file(&place, &name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                remove_unused(&place);
                make(&place, &name, wanted).map_err(failed)?;
                continue;
            }
            Err(error) => return Err(failed(error)),
        };
        let found = read_header(&file);
        if found != Some(wanted) && remove_if_unused(&place, &name, &file) {
            continue;
        }
        let Some(in_use) = FileUse::share(&file).map_err(failed)? else {
            // Somebody is about to remove it.
            std::thread::yield_now();
            continue;
        };
        // Removed before it was held: the next one that looks makes another.
        if file.metadata().map_err(failed)?.nlink() == 0 {
            continue;
        }
        let Some(found) = found.filter(|found| found.slot_bytes == slot_bytes) else {
            let message = "somebody uses this file, and it is not memory shared by this version";
            return Err(Error::new(ErrorKind::Io, message).with_path(&path));
        };
        let invalid = || failed(io::ErrorKind::InvalidData.into());
        let layout = found.layout().ok_or_else(invalid)?;
        let slots_total = layout.slots_total().ok_or_else(invalid)?;
        let slots = SharedSlots::new(file, layout).map_err(failed)?;
        return Ok(OpenSegment {
            segment: Segment::new(slots, found),
            slots_total,
            _in_use: in_use,
        });
    }
    Err(failed(io::ErrorKind::ResourceBusy.into()))
}

fn open_folder(folder: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
}

/// Opens a file of the folder that is regular and this user's.
fn open_file(place: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(place, name, flags, Mode::empty())?);
    let status = file.metadata()?;
    if !status.is_file() || status.uid() != rustix::process::geteuid().as_raw() {
        let message = "not a regular file of this user";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(file)
}

/// Makes a segment that is whole when it gets its name. Another one that got it before is as good.
fn make(place: &OwnedFd, name: &str, arrangement: Arrangement) -> io::Result<()> {
    let layout = arrangement.layout().ok_or(io::ErrorKind::InvalidInput)?;
    let bytes = layout.file_bytes().ok_or(io::ErrorKind::InvalidInput)?;
    // A file without a name: one whose maker dies over it is gone.
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(
        place,
        ".",
        flags,
        Mode::RUSR | Mode::WUSR,
    )?);
    file.set_len(bytes)?;
    // The words' memory must be there: a process that writes to what cannot be had is killed.
    let words = (layout.words * 8) as u64;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, words)?;
    file.write_all_at(&header(arrangement), 0)?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, unnamed, place, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn header(arrangement: Arrangement) -> Vec<u8> {
    let Arrangement {
        slot_bytes,
        sets,
        ways,
    } = arrangement;
    let words = [MAGIC, VERSION, slot_bytes as u64, sets as u64, ways as u64];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Returns how a segment is arranged; `None` for a file that is none, or not a whole one.
fn read_header(file: &File) -> Option<Arrangement> {
    let mut bytes = [0; USED_WORDS * 8];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let number = |index: usize| {
        let word = bytes.get(index * 8..index * 8 + 8)?;
        usize::try_from(u64::from_le_bytes(word.try_into().ok()?)).ok()
    };
    let arrangement = Arrangement {
        slot_bytes: number(2)?,
        sets: number(3)?,
        ways: number(4)?,
    };
    let file_bytes = arrangement.layout()?.file_bytes()?;
    let is_whole = file.metadata().ok()?.len() == file_bytes;
    let is_valid = arrangement.sets > 0 && arrangement.ways > 0 && bytes[..] == header(arrangement);
    (is_whole && is_valid).then_some(arrangement)
}

/// Removes the segments of a folder that nobody uses.
fn remove_unused(place: &OwnedFd) {
    let Ok(entries) = Dir::read_from(place) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        if name.ends_with(ENDING)
            && let Ok(file) = open_file(place, name)
        {
            remove_if_unused(place, name, &file);
        }
    }
}

/// Removes an open segment unless somebody uses it. Returns whether it did.
fn remove_if_unused(place: &OwnedFd, name: &str, file: &File) -> bool {
    let Ok(Some(_alone)) = FileUse::alone(file) else {
        return false;
    };
    // Its name may be another's by now.
    is_named(place.as_fd(), name, file)
        && rustix::fs::unlinkat(place, name, AtFlags::empty()).is_ok()
}

fn is_named(place: BorrowedFd<'_>, name: &str, file: &File) -> bool {
    let named = rustix::fs::statat(place, name, AtFlags::SYMLINK_NOFOLLOW);
    match (named, file.metadata()) {
        (Ok(named), Ok(status)) => named.st_ino == status.ino() && named.st_dev == status.dev(),
        _ => false,
    }
}
