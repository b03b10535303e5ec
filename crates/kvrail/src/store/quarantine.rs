//! Setting bad chunks aside: out of the way of lookups, kept for whoever wants to look.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::directory::{NamespaceDirectory, create_directory};
use crate::error::{Error, Result};

/// Chunks kept in a quarantine; the oldest goes when another one comes.
const QUARANTINE_MAX: usize = 100;

/// Moves whatever stands at a chunk's name into the quarantine.
///
/// `inode` is the number of the file that was found bad, if it could be opened: a good chunk that
/// another instance published meanwhile stays. Returns whether something was moved.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the file system refuses.
pub(super) fn set_aside(
    directory: &NamespaceDirectory,
    path: &Path,
    inode: Option<u64>,
) -> Result<bool> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(false);
    };
    if inode.is_some_and(|inode| inode != metadata.ino()) {
        return Ok(false);
    }
    let folder = directory.quarantine();
    create_directory(&folder)?;
    make_room(&folder)?;
    match std::fs::rename(path, target(&folder, path)) {
        Ok(()) => Ok(true),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::io("set aside", path, source)),
    }
}

/// Returns a name that sorts by time: `<nanoseconds>-<group and rank>-<file name>`.
fn target(folder: &Path, path: &Path) -> PathBuf {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let part = |path: Option<&Path>| {
        let name = path.and_then(Path::file_name).unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let rank = part(path.parent().and_then(Path::parent));
    folder.join(format!("{now:020}-{rank}-{}", part(Some(path))))
}

/// Removes the oldest entries until one more fits.
fn make_room(folder: &Path) -> Result<()> {
    let failed = |source| Error::io("read directory", folder, source);
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(failed)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    let surplus = (entries.len() + 1).saturating_sub(QUARANTINE_MAX);
    for path in entries.iter().take(surplus) {
        // A folder that somebody put in a chunk's place is removed only when it is empty: its
        // content is not ours.
        let removed = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
        if let Err(source) = removed {
            return Err(Error::io("remove from quarantine", path, source));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Namespace;
    use super::*;

    #[test]
    fn the_quarantine_is_bounded_and_spares_new_files() {
        let root = tempfile::tempdir().unwrap();
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(root.path(), &namespace);
        let folder = directory.path().join("g0r0/abc");
        create_directory(&folder).unwrap();
        for index in 0..QUARANTINE_MAX + 20 {
            let path = folder.join(format!("{index}.safetensors"));
            std::fs::write(&path, "bad").unwrap();
            assert!(set_aside(&directory, &path, None).unwrap());
            assert!(!path.exists());
        }
        let kept = std::fs::read_dir(directory.quarantine()).unwrap().count();
        assert_eq!(kept, QUARANTINE_MAX);
        let path = folder.join("new.safetensors");
        std::fs::write(&path, "good").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        assert!(!set_aside(&directory, &path, Some(inode + 1)).unwrap());
        assert!(path.exists());
        assert!(!set_aside(&directory, &folder.join("gone"), None).unwrap());
    }
}
