//! Where things lie in a path's directory. Names only; see `docs/format.md`.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::namespace::Namespace;
use crate::chunk::ChunkKey;
use crate::error::{Error, Result};

/// Ending of a chunk file's name.
pub(super) const CHUNK_SUFFIX: &str = ".safetensors";
/// File that holds a namespace's identity.
pub(super) const MANIFEST_NAME: &str = "manifest.json";
/// Folder of files that are being written; same file system, so a rename publishes.
pub(super) const TEMPORARY_NAME: &str = "tmp";
/// Folder of chunks that were set aside.
pub(super) const QUARANTINE_NAME: &str = "quarantine";

/// The directory of one namespace on one path.
#[derive(Debug, Clone)]
pub(super) struct NamespaceDirectory {
    path: PathBuf,
}

impl NamespaceDirectory {
    pub(super) fn new(root: &Path, namespace: &Namespace) -> Self {
        Self {
            path: root.join(namespace.directory_name()),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn manifest(&self) -> PathBuf {
        self.path.join(MANIFEST_NAME)
    }

    pub(super) fn temporary(&self) -> PathBuf {
        self.path.join(TEMPORARY_NAME)
    }

    pub(super) fn quarantine(&self) -> PathBuf {
        self.path.join(QUARANTINE_NAME)
    }

    /// Returns the place of a chunk: three hex digits of fan-out keep folders at a size that
    /// every file system handles well (10 million chunks make 2,500 to a folder).
    pub(super) fn chunk(&self, group: u32, rank: u32, key: &ChunkKey) -> PathBuf {
        let name = format!("{key}{CHUNK_SUFFIX}");
        let fan_out = name.get(..3).unwrap_or_default().to_owned();
        self.path
            .join(format!("g{group}r{rank}"))
            .join(fan_out)
            .join(name)
    }
}

/// Creates a directory and its parents, for the owner only. One that exists is left as it is.
pub(super) fn create_directory(path: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    match made {
        Ok(()) => Ok(()),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
            let cause = io::Error::from(io::ErrorKind::NotADirectory);
            Err(Error::io("create directory", path, cause))
        }
        Err(source) => Err(Error::io("create directory", path, source)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn chunks_fan_out_by_three_digits() {
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let directory = NamespaceDirectory::new(Path::new("/kv"), &namespace);
        let key = ChunkKey::from_bytes(&[0xab; 32]).unwrap();
        let path = directory.chunk(0, 3, &key);
        let expected = format!("g0r3/aba/{}.safetensors", "ab".repeat(32));
        assert!(path.ends_with(expected), "{}", path.display());
    }

    #[test]
    fn directories_are_made_for_the_owner_only() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        create_directory(&path).unwrap();
        create_directory(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        std::fs::write(root.path().join("file"), "").unwrap();
        assert!(create_directory(&root.path().join("file")).is_err());
    }
}
