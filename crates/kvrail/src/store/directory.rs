//! Where things lie in a path's directory, and how they are reached; see `docs/format.md`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::durable::SyncedFolders;
use super::lingering::LingeringFiles;
use super::lmcache_names::LmcacheTree;
use super::namespace::Namespace;
use super::present::Place;
use crate::chunk::{ChunkKey, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, FolderRules, make_path};

/// Ending of a chunk file's name.
const CHUNK_SUFFIX: &str = ".safetensors";
/// Hex digits of fan-out: they keep folders at a size that every file system handles well
/// (10 million chunks make 2,500 to a folder).
const FAN_OUT_DIGITS: usize = 3;
/// File that holds a namespace's identity.
pub(super) const MANIFEST_NAME: &str = "manifest.json";
/// Folder of files that are being written; same file system, so a rename publishes.
pub(super) const TEMPORARY_NAME: &str = "tmp";
/// Folder of chunks that were set aside.
pub(super) const QUARANTINE_NAME: &str = "quarantine";

/// The directory of one namespace on one path.
///
/// Paths are for messages. Whatever is done goes through [`NamespaceDirectory::open`], anew for
/// each operation, so that a directory that others removed, made again or mounted is seen.
#[derive(Debug, Clone)]
pub(super) struct NamespaceDirectory {
    root: PathBuf,
    name: String,
    path: PathBuf,
    rules: FolderRules,
    /// Where it is LMCache's: then the directory is the path itself, and there is no manifest.
    pub(super) lmcache: Option<Arc<LmcacheTree>>,
    pub(super) synced: Arc<SyncedFolders>,
    pub(super) lingering: Arc<LingeringFiles>,
}

/// The name of a file in a namespace: a folder, and the name in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// `None` for the namespace's directory itself.
    pub(super) folder: Option<String>,
    pub(super) name: String,
}

impl NamespaceDirectory {
    pub(super) fn new(root: &Path, namespace: &Namespace) -> Self {
        let name = namespace.directory_name();
        Self {
            path: root.join(&name),
            root: root.to_path_buf(),
            name,
            rules: FolderRules::default(),
            lmcache: None,
            synced: Arc::default(),
            lingering: Arc::default(),
        }
    }

    /// Makes it LMCache's directory, whose files lie in the path itself.
    #[must_use]
    pub(super) fn of_lmcache(mut self, tree: LmcacheTree) -> Self {
        self.path = self.root.clone();
        self.lmcache = Some(Arc::new(tree));
        self
    }

    /// Takes the directory of a namespace that exists; what is created has bits as it has.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the path does not end in a name,
    /// [`ErrorKind::Io`] when it cannot be opened.
    pub(super) fn at(path: &Path) -> Result<Self> {
        let (Some(root), Some(name)) = (
            path.parent(),
            path.file_name().and_then(|name| name.to_str()),
        ) else {
            let message = "not the directory of a namespace";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(path));
        };
        let root = match root.as_os_str().is_empty() {
            true => Path::new("."),
            false => root,
        };
        let mut directory = Self {
            root: root.to_path_buf(),
            name: name.to_owned(),
            path: path.to_path_buf(),
            rules: FolderRules::default(),
            lmcache: None,
            synced: Arc::default(),
            lingering: Arc::default(),
        };
        directory.rules.permissions = directory.open()?.own_permissions()?;
        Ok(directory)
    }

    /// Sets the bits of what is created, and who is told of changes.
    #[must_use]
    pub(super) fn with_rules(mut self, rules: FolderRules) -> Self {
        self.rules = rules;
        self
    }

    /// Opens the directory, through no symbolic link below the root.
    pub(super) fn open(&self) -> Result<Folder> {
        let root = self.open_root()?;
        match &self.lmcache {
            None => root.folder(&self.name),
            Some(_) => Ok(root),
        }
    }

    /// Opens the directory, and makes it, its root and its parents where they are missing.
    pub(super) fn make(&self, sync: bool) -> Result<Folder> {
        make_path(&self.root, &self.rules, sync)?;
        match &self.lmcache {
            None => self.open_root()?.make(&self.name, sync),
            Some(_) => self.open_root(),
        }
    }

    /// Returns the location of a chunk.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a key that LMCache's directory has no name for.
    pub(super) fn chunk_location(&self, (group, part, key): &Place) -> Result<Location> {
        match &self.lmcache {
            None => Ok(Location::chunk(*group, *part, key)),
            Some(tree) => tree.chunk(part.rank(), key),
        }
    }

    /// Returns the location of the file whose name says that a chunk is there: its own, but for
    /// LMCache's, which are there when their metadata is.
    ///
    /// # Errors
    /// As [`Self::chunk_location`].
    pub(super) fn sign_location(&self, place: &Place) -> Result<Location> {
        match &self.lmcache {
            None => self.chunk_location(place),
            Some(tree) => tree.metadata(place.1.rank(), &place.2),
        }
    }

    /// Opens the path that holds the namespaces.
    pub(super) fn open_root(&self) -> Result<Folder> {
        Folder::open(&self.root, self.rules.clone())
    }

    /// Tries again to remove temp files that could not be removed.
    pub(super) fn remove_lingering(&self) {
        if self.lingering.is_empty() {
            return;
        }
        // They stay where the folder cannot be opened.
        if let Ok(folder) = self.open().and_then(|folder| folder.folder(TEMPORARY_NAME)) {
            self.lingering.remove(&folder);
        }
    }

    #[cfg(test)]
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the folder for temp files, for another process that makes one there.
    pub(super) fn temporary_path(&self) -> PathBuf {
        self.path.join(TEMPORARY_NAME)
    }

    pub(super) fn manifest(&self) -> PathBuf {
        self.path.join(MANIFEST_NAME)
    }

    /// Returns a chunk's path for messages.
    #[cfg(test)]
    pub(super) fn chunk(&self, group: u32, part: Part, key: &ChunkKey) -> PathBuf {
        self.path.join(Location::chunk(group, part, key).below())
    }
}

impl Location {
    /// Returns the location of a chunk.
    pub(super) fn chunk(group: u32, part: Part, key: &ChunkKey) -> Self {
        let name = chunk_name(key);
        let fan_out = name.get(..FAN_OUT_DIGITS).unwrap_or_default();
        Self {
            folder: Some(format!("{}/{fan_out}", part_name(group, part))),
            name,
        }
    }

    /// Returns the location of the manifest.
    pub(super) fn manifest() -> Self {
        Self {
            folder: None,
            name: MANIFEST_NAME.to_owned(),
        }
    }

    /// Returns the path below the namespace's directory.
    pub(super) fn below(&self) -> String {
        match &self.folder {
            Some(folder) => format!("{folder}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// Returns the folder name of a group's part.
pub(super) fn part_name(group: u32, part: Part) -> String {
    format!("g{group}r{part}")
}

/// Reads the folder name of a group's part; any other spelling of the numbers is none.
pub(super) fn parse_part_name(name: &str) -> Option<(u32, Part)> {
    let (group, part) = name.strip_prefix('g')?.split_once('r')?;
    let (group, part) = (group.parse().ok()?, Part::parse(part)?);
    (part_name(group, part) == name).then_some((group, part))
}

/// Returns the file name of a chunk.
pub(super) fn chunk_name(key: &ChunkKey) -> String {
    format!("{key}{CHUNK_SUFFIX}")
}

/// Reads the file name of a chunk.
pub(super) fn parse_chunk_name(name: &str) -> Option<ChunkKey> {
    ChunkKey::from_hex(name.strip_suffix(CHUNK_SUFFIX)?).ok()
}

/// Returns whether a name is one of a fan-out folder.
pub(super) fn is_fan_out_name(name: &str) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    name.len() == FAN_OUT_DIGITS && name.bytes().all(digit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn chunks_fan_out_by_three_digits() {
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(Path::new("/kv"), &namespace);
        let key = ChunkKey::from_bytes(&[0xab; 32]).unwrap();
        let path = directory.chunk(0, 3.into(), &key);
        let expected = format!("g0r3/aba/{}.safetensors", "ab".repeat(32));
        assert!(path.ends_with(expected), "{}", path.display());
        assert!(is_fan_out_name("aba") && !is_fan_out_name("ABA") && !is_fan_out_name("ab"));
    }

    #[test]
    fn a_directory_is_made_again_and_a_link_in_its_place_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(&root.path().join("kv"), &namespace);
        assert!(directory.open().is_err());
        directory.make(true).unwrap();
        std::fs::remove_dir_all(root.path().join("kv")).unwrap();
        assert!(directory.open().is_err());
        directory.make(false).unwrap();
        directory.open().unwrap();
        std::fs::remove_dir(directory.path()).unwrap();
        std::os::unix::fs::symlink("/tmp", directory.path()).unwrap();
        assert!(directory.open().is_err() && directory.make(false).is_err());
    }

    proptest! {
        /// What is read from disk is taken only when the name made of it is the same.
        #[test]
        fn names_have_one_spelling(name in "g[0-9+]{1,3}r[0-9-]{1,3}(h[0-9]-[0-9])?|.{0,12}") {
            if let Some((group, part)) = parse_part_name(&name) {
                prop_assert_eq!(part_name(group, part), name);
            }
        }

        #[test]
        fn chunk_names_round_trip(hash in proptest::collection::vec(any::<u8>(), 8..=32)) {
            let key = ChunkKey::from_bytes(&hash).unwrap();
            prop_assert_eq!(parse_chunk_name(&chunk_name(&key)), Some(key));
        }
    }
}
