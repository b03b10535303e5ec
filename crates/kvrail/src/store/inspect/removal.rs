//! Removing what kvrail made, by the names that kvrail gives, and nothing else.

use std::path::{Path, PathBuf};

use super::super::capacity::LOG_NAMES;
use super::super::directory::{MANIFEST_NAME, QUARANTINE_NAME, TEMPORARY_NAME, is_fan_out_name};
use super::super::directory::{parse_part_name, part_name};
use super::super::namespace::parse_directory_name;
use super::super::publish::is_missing;
use super::super::quarantine;
use super::super::writer::is_writers_name;
use super::{chunks, open_namespace};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, FolderRules};

/// What was removed of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Chunks, those in quarantine included.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Folders that stay, because something in them is not kvrail's.
    pub kept_folders: Vec<PathBuf>,
}

/// Removes a whole namespace. `seen` is told of each chunk that goes, with its bytes.
///
/// An instance that uses it has misses and makes it again with its next store. Files that kvrail
/// did not name stay, with the folders that hold them.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] unless the directory is named as a namespace,
/// [`ErrorKind::Io`] when something cannot be removed.
pub fn remove_namespace(directory: &Path, seen: &mut dyn FnMut(u64)) -> Result<Removed> {
    let name = directory.file_name().and_then(|name| name.to_str());
    let (Some(root), Some(name)) = (directory.parent(), name) else {
        return Err(no_namespace(directory));
    };
    if parse_directory_name(name).is_none() {
        return Err(no_namespace(directory));
    }
    let namespace = open_namespace(directory)?;
    let mut removed = Removed::default();
    for chunk in chunks(directory) {
        let chunk = match chunk {
            // A link or a file in a folder's place: it stays, and is noted below.
            Err(error) if is_not_ours(&error) => continue,
            chunk => chunk?,
        };
        if chunk.remove()? {
            removed.chunks += 1;
            removed.bytes += chunk.bytes;
            seen(chunk.bytes);
        }
    }
    for (group, rank) in super::namespace::ranks(&namespace)? {
        let folder = namespace.folder(part_name(group, rank))?;
        for name in names(&folder)? {
            if is_fan_out_name(&name) {
                remove_folder(&folder, &name, &mut removed)?;
            }
        }
    }
    remove_quarantined(&namespace, &mut removed, seen)?;
    if let Ok(temporary) = namespace.folder(TEMPORARY_NAME) {
        for name in names(&temporary)? {
            if is_writers_name(&name) {
                gone_is_fine(temporary.remove_file(&name))?;
            }
        }
    }
    for name in names(&namespace)? {
        let is_ours = name == TEMPORARY_NAME || name == QUARANTINE_NAME;
        if is_ours || parse_part_name(&name).is_some() {
            remove_folder(&namespace, &name, &mut removed)?;
        }
    }
    for name in LOG_NAMES {
        gone_is_fine(namespace.remove_file(name))?;
    }
    // Last of the files: as long as there is one, this is a namespace that can be removed again.
    gone_is_fine(namespace.remove_file(MANIFEST_NAME))?;
    let root = match root.as_os_str().is_empty() {
        true => Path::new("."),
        false => root,
    };
    let root = Folder::open(root, FolderRules::default())?;
    remove_folder(&root, name, &mut removed)?;
    Ok(removed)
}

/// Removes what lies in the quarantine of a namespace directory. `seen` is told of each chunk that
/// goes, with its bytes.
///
/// # Errors
/// [`ErrorKind::Io`] when it cannot be read.
pub fn empty_quarantine(namespace_directory: &Path, seen: &mut dyn FnMut(u64)) -> Result<Removed> {
    let mut removed = Removed::default();
    let namespace = open_namespace(namespace_directory)?;
    remove_quarantined(&namespace, &mut removed, seen)?;
    Ok(removed)
}

fn remove_quarantined(
    namespace: &Folder,
    removed: &mut Removed,
    seen: &mut dyn FnMut(u64),
) -> Result<()> {
    let Ok(folder) = namespace.folder(QUARANTINE_NAME) else {
        return Ok(());
    };
    for name in quarantine::list(&folder)? {
        let bytes = folder.status(name.to_string())?;
        let bytes = bytes.map_or(0, |status| status.bytes);
        // A folder of somebody else stays, and the quarantine with it.
        if quarantine::remove(&folder, &name).is_ok() {
            removed.chunks += 1;
            removed.bytes += bytes;
            seen(bytes);
        }
    }
    quarantine::remove_reasons(&folder)
}

/// Removes a folder that is empty; one that is not stays and is noted.
fn remove_folder(parent: &Folder, name: &str, removed: &mut Removed) -> Result<()> {
    match gone_is_fine(parent.remove_folder(name)) {
        Err(error) if is_not_ours(&error) => {
            removed.kept_folders.push(parent.path().join(name));
            Ok(())
        }
        result => result,
    }
}

fn names(folder: &Folder) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for name in folder.names()? {
        found.extend(name?.into_string().ok());
    }
    Ok(found)
}

fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if is_missing(&error) => Ok(()),
        result => result,
    }
}

/// Returns whether the system says that a folder is not empty, or that it is a file or a link.
fn is_not_ours(error: &Error) -> bool {
    use std::io::ErrorKind as Os;
    let kind = error.os_error().map(std::io::Error::kind);
    matches!(
        kind,
        Some(Os::DirectoryNotEmpty | Os::AlreadyExists | Os::NotADirectory)
    )
}

fn no_namespace(directory: &Path) -> Error {
    let message = "not the directory of a namespace";
    Error::new(ErrorKind::InvalidArgument, message).with_path(directory)
}
