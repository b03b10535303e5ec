//! Setting bad chunks aside: out of the way of lookups, kept for whoever wants to look.
//!
//! `quarantine/<nanoseconds, 20 digits>-g<group>r<part>-<chunk key>.safetensors` is the file,
//! the same with `.json` behind it says why. What cannot be kept (another file system, somebody
//! else's folder, a full quarantine) is removed: a bad chunk is worth nothing beside the next one.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::directory::{
    Location, NamespaceDirectory, QUARANTINE_NAME, chunk_name, parse_chunk_name, parse_part_name,
    part_name,
};
use super::present::Place;
use super::publish::is_missing;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, IoFile, OpenMode};

/// Chunks kept in a quarantine; the oldest goes when another one comes.
pub(super) const QUARANTINE_MAX: usize = 100;
/// Names looked at when room is made; others than ours may have put more there.
const NAMES_MAX: usize = 10_000;
/// Bytes of the file that says why.
const REASON_BYTES_MAX: usize = 4096;
/// Characters of a reason: with every one escaped as JSON it still fits.
const REASON_CHARACTERS_MAX: usize = 600;
/// A reason whose chunk is gone is removed when it is older than this, so that one whose chunk has
/// just been listed by somebody else stays.
const ORPHAN_AGE: Duration = Duration::from_secs(60);
const REASON_SUFFIX: &str = ".json";

/// What became of a bad chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SetAside {
    /// It lies in the quarantine.
    Kept,
    /// It could not be kept and is gone.
    Removed,
    /// It was gone already, or another file has its name.
    NotThere,
}

/// The name of a chunk in the quarantine; it sorts by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct QuarantineName {
    pub(super) nanoseconds: u64,
    pub(super) place: Place,
}

/// Why a chunk was set aside, as its file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reason {
    /// What was wrong.
    pub(super) reason: String,
    /// The process that found it.
    pub(super) process: u32,
}

/// Moves whatever stands at a chunk's name into the quarantine.
///
/// `inode` is the number of the file that was found bad, if it could be opened: a good chunk that
/// another instance published meanwhile stays.
///
/// # Errors
/// [`ErrorKind::Io`] when the file system refuses to move and to remove it.
pub(super) fn set_aside(
    directory: &NamespaceDirectory,
    place: &Place,
    inode: Option<u64>,
    reason: &str,
) -> Result<SetAside> {
    let (group, rank, key) = place;
    let location = Location::chunk(*group, *rank, key);
    let namespace = directory.open()?;
    let folder = match namespace.folder(location.folder.as_deref().unwrap_or_default()) {
        Err(error) if is_missing(&error) => return Ok(SetAside::NotThere),
        folder => folder?,
    };
    let bad = match folder.status(&location.name)? {
        Some(status) if inode.is_none_or(|inode| inode == status.inode) => status,
        _ => return Ok(SetAside::NotThere),
    };
    let name = QuarantineName::now(*place);
    let moved = quarantine_folder(&namespace, bad.is_folder).and_then(|quarantine| {
        let kept = move_into(&quarantine, &name, &folder, &location.name, bad.inode)?;
        Ok((kept, quarantine))
    });
    match moved {
        Ok((true, quarantine)) => {
            // The chunk is out of the way; not to know why is no reason to fail.
            drop(write_reason(&quarantine, &name, reason));
            Ok(SetAside::Kept)
        }
        Ok((false, _)) => Ok(SetAside::NotThere),
        Err(error) if is_missing(&error) => Ok(SetAside::NotThere),
        Err(error) => {
            let removed = if bad.is_folder {
                folder.remove_folder(&location.name)
            } else {
                folder.remove_file(&location.name)
            };
            removed.map(|()| SetAside::Removed).map_err(|_| error)
        }
    }
}

/// Opens the quarantine with room for one more; `must` when it goes there whatever is there.
fn quarantine_folder(namespace: &Folder, must: bool) -> Result<Folder> {
    let quarantine = namespace.make(QUARANTINE_NAME, false)?;
    match make_room(&quarantine) {
        // A folder in a chunk's place can be removed only when it is empty: it would block its
        // key for ever, and takes up no more room here than there.
        Err(_) if must => Ok(quarantine),
        result => result.map(|()| quarantine),
    }
}

/// Moves a chunk into the quarantine. Returns whether it was the one with the number `inode`.
fn move_into(
    quarantine: &Folder,
    name: &QuarantineName,
    folder: &Folder,
    source: &str,
    inode: u64,
) -> Result<bool> {
    let target = name.to_string();
    folder.rename(source, quarantine, &target)?;
    let moved = quarantine.status(&target)?.map(|status| status.inode);
    // None: others have filled the quarantine meanwhile, and this was the oldest.
    if moved.is_none_or(|moved| moved == inode) {
        return Ok(true);
    }
    // Another instance published between the look and the move: its chunk goes back, unless yet
    // another one came. Losing it would be a miss and no more.
    if quarantine.rename_to_free(&target, folder, source).is_err() {
        drop(quarantine.remove_file(&target));
    }
    Ok(false)
}

/// Writes why a chunk was set aside, beside it.
fn write_reason(quarantine: &Folder, name: &QuarantineName, reason: &str) -> Result<()> {
    let text = Reason {
        reason: reason.chars().take(REASON_CHARACTERS_MAX).collect(),
        process: std::process::id(),
    };
    let text = serde_json::to_vec(&text)
        .map_err(|error| Error::new(ErrorKind::InvalidArgument, "reason").with_source(error))?;
    let name = format!("{name}{REASON_SUFFIX}");
    let file = IoFile::open_in(quarantine, name, OpenMode::CreateNew, false)?;
    // A short write leaves a reason that cannot be read, which readers expect.
    rustix::io::pwrite(&file, &text, 0)
        .map_err(|errno| Error::io("write", file.path(), errno.into()))?;
    Ok(())
}

/// Reads why a chunk was set aside; `None` where nothing says so.
pub(super) fn read_reason(quarantine: &Folder, name: &QuarantineName) -> Option<Reason> {
    let name = format!("{name}{REASON_SUFFIX}");
    let file = IoFile::open_in(quarantine, name, OpenMode::Read, false).ok()?;
    file.regular_bytes().ok()??;
    let mut text = vec![0; REASON_BYTES_MAX];
    let count = rustix::io::pread(&file, &mut text, 0).ok()?;
    Reason::parse(text.get(..count)?)
}

/// Lists a quarantine, oldest first.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be read.
pub(super) fn list(quarantine: &Folder) -> Result<Vec<QuarantineName>> {
    Ok(Listing::of(quarantine)?.chunks)
}

#[derive(Default)]
struct Listing {
    chunks: Vec<QuarantineName>,
    reasons: Vec<QuarantineName>,
}

impl Listing {
    fn of(quarantine: &Folder) -> Result<Self> {
        let mut listing = Self::default();
        for name in quarantine.names()?.take(NAMES_MAX) {
            // What is not ours stays, and is not counted.
            let Ok(name) = name?.into_string() else {
                continue;
            };
            if let Some(name) = name.strip_suffix(REASON_SUFFIX) {
                listing.reasons.extend(QuarantineName::parse(name));
            } else {
                listing.chunks.extend(QuarantineName::parse(&name));
            }
        }
        listing.chunks.sort_unstable();
        Ok(listing)
    }
}

/// Removes the oldest chunks until one more fits, and reasons that are left over.
///
/// Others may do the same at the same time: what has gone already counts as removed.
fn make_room(quarantine: &Folder) -> Result<()> {
    let listing = Listing::of(quarantine)?;
    let now = QuarantineName::clock();
    for orphan in &listing.reasons {
        let age = Duration::from_nanos(now.saturating_sub(orphan.nanoseconds));
        if age > ORPHAN_AGE && listing.chunks.binary_search(orphan).is_err() {
            drop(quarantine.remove_file(format!("{orphan}{REASON_SUFFIX}")));
        }
    }
    let mut surplus = (listing.chunks.len() + 1).saturating_sub(QUARANTINE_MAX);
    for name in &listing.chunks {
        if surplus == 0 {
            return Ok(());
        }
        if remove(quarantine, name).is_ok() {
            surplus -= 1;
        }
    }
    if surplus == 0 {
        return Ok(());
    }
    let message = format!(
        "quarantine: {} of {} entries cannot be removed",
        surplus + QUARANTINE_MAX - 1,
        listing.chunks.len()
    );
    Err(Error::new(ErrorKind::Io, message).with_path(quarantine.path()))
}

/// Removes all reasons, when their chunks are gone.
///
/// # Errors
/// [`ErrorKind::Io`] when the folder cannot be read.
pub(super) fn remove_reasons(quarantine: &Folder) -> Result<()> {
    for name in Listing::of(quarantine)?.reasons {
        drop(quarantine.remove_file(format!("{name}{REASON_SUFFIX}")));
    }
    Ok(())
}

/// Removes a chunk from the quarantine, its reason first, so that no reason is left alone.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be removed: a folder that somebody put in a chunk's place and
/// that is not empty.
pub(super) fn remove(quarantine: &Folder, name: &QuarantineName) -> Result<()> {
    drop(quarantine.remove_file(format!("{name}{REASON_SUFFIX}")));
    let name = name.to_string();
    let removed = quarantine.remove_file(&name);
    let removed = removed.or_else(|error| match is_missing(&error) {
        true => Ok(()),
        false => quarantine.remove_folder(&name),
    });
    match removed {
        Err(error) if !is_missing(&error) => Err(error),
        _ => Ok(()),
    }
}

impl QuarantineName {
    fn now(place: Place) -> Self {
        Self {
            nanoseconds: Self::clock(),
            place,
        }
    }

    /// Returns nanoseconds since 1970; 64 bits of them end in 2554.
    fn clock() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Reads a name; any other spelling is none of ours.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (nanoseconds, rest) = text.split_once('-')?;
        let (part, chunk) = rest.rsplit_once('-')?;
        let (group, part) = parse_part_name(part)?;
        let name = Self {
            nanoseconds: nanoseconds.parse().ok()?,
            place: (group, part, parse_chunk_name(chunk)?),
        };
        (name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for QuarantineName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (group, part, key) = &self.place;
        let (part, chunk) = (part_name(*group, *part), chunk_name(key));
        write!(out, "{:020}-{part}-{chunk}", self.nanoseconds)
    }
}

impl Reason {
    /// Reads the text of a reason.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }
}

#[cfg(test)]
mod tests;
