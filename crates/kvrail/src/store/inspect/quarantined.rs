//! The chunks that were set aside, and setting one aside by hand.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::super::directory::{NamespaceDirectory, QUARANTINE_NAME};
use super::super::publish::is_missing;
use super::super::quarantine::{self, SetAside};
use super::{ChunkFile, open_namespace};
use crate::chunk::{ChunkKey, Part};
use crate::error::Result;

/// A chunk in a quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantinedChunk {
    /// Where it is.
    pub path: PathBuf,
    /// The KV cache group that it was stored for.
    pub group: u32,
    /// The part that it holds.
    pub rank: Part,
    /// The key under which it stood.
    pub key: ChunkKey,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was set aside.
    pub since: SystemTime,
    /// What was wrong; `None` when nothing says so.
    pub reason: Option<String>,
}

/// What became of a chunk that was to be set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It lies in the quarantine.
    SetAside,
    /// It could not be kept there and is gone.
    Removed,
    /// It had gone already, or another file has its name by now.
    NotThere,
}

/// Lists the quarantine of a namespace directory, oldest first.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when it cannot be read.
pub fn quarantined(namespace_directory: &Path) -> Result<Vec<QuarantinedChunk>> {
    let folder = match open_namespace(namespace_directory)?.folder(QUARANTINE_NAME) {
        Err(error) if is_missing(&error) => return Ok(Vec::new()),
        folder => folder?,
    };
    let mut found = Vec::new();
    for name in quarantine::list(&folder)? {
        let Some(status) = folder.status(name.to_string())? else {
            continue;
        };
        let (group, rank, key) = name.place;
        let since = SystemTime::UNIX_EPOCH + Duration::from_nanos(name.nanoseconds);
        found.push(QuarantinedChunk {
            path: folder.path().join(name.to_string()),
            group,
            rank,
            key,
            bytes: status.bytes,
            since,
            reason: quarantine::read_reason(&folder, &name).map(|found| found.reason),
        });
    }
    Ok(found)
}

/// Moves a chunk that was found bad into its namespace's quarantine, which says why.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when it can neither be moved nor removed.
pub fn set_aside(file: &ChunkFile, reason: &str) -> Result<Handled> {
    let directory = NamespaceDirectory::at(&file.namespace)?;
    let handled = quarantine::set_aside(&directory, &file.place(), Some(file.inode), reason)?;
    Ok(match handled {
        SetAside::Kept => Handled::SetAside,
        SetAside::Removed => Handled::Removed,
        SetAside::NotThere => Handled::NotThere,
    })
}
