//! The names of files in LMCache's directory, from chunk keys; see `docs/format-lmcache.md`.

use std::path::Path;

use kvrail_cuda::system::{Mount, SystemView};

use super::directory::Location;
use crate::chunk::ChunkKey;
use crate::error::{Error, ErrorKind, Result};
use crate::lmcache::{ChunkHash, Element, FileKind, FilePlace, LmcacheKey};

/// The file system whose files have names of their own.
const WEKA: &str = "wekafs";

/// What the files of LMCache's directory are named by, beside the chunk's hash and the rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LmcacheNames {
    /// The model's name, as vLLM was given it.
    pub model: String,
    /// Workers of the instance; 1 where all have the same bytes.
    pub workers: u32,
    /// The type of the KV cache's elements.
    pub element: Element,
    /// Whether hashes are numbers with a sign, as those of Python's `hash` are.
    pub has_sign: bool,
}

/// LMCache's directory on one path.
#[derive(Debug)]
pub(super) struct LmcacheTree {
    names: LmcacheNames,
    is_on_weka: bool,
}

impl LmcacheTree {
    /// Makes the names on the file system that `path` is on, or will be.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] where the files of such names would have none.
    pub(super) fn new(names: LmcacheNames, system: &SystemView, path: &Path) -> Result<Self> {
        let tree = Self {
            is_on_weka: is_on_weka(system, path),
            names,
        };
        // The longest that there are.
        let longest = ChunkKey::from_bytes(&i64::MIN.to_be_bytes())?;
        tree.metadata(u32::MAX, &longest)?;
        Ok(tree)
    }

    /// Returns the location of a chunk's file.
    pub(super) fn chunk(&self, rank: u32, key: &ChunkKey) -> Result<Location> {
        self.location(rank, key, FileKind::Chunk)
    }

    /// Returns the location of its metadata.
    pub(super) fn metadata(&self, rank: u32, key: &ChunkKey) -> Result<Location> {
        self.location(rank, key, FileKind::Metadata)
    }

    fn location(&self, rank: u32, key: &ChunkKey, kind: FileKind) -> Result<Location> {
        let bits = key.as_bytes().try_into().map_err(|_| {
            let message = format!("chunk key {key}: expected 8 bytes, as LMCache's hashes have");
            Error::new(ErrorKind::InvalidArgument, message)
        })?;
        let place = FilePlace {
            key: LmcacheKey {
                model: self.names.model.clone(),
                world_size: self.names.workers,
                worker: rank,
                hash: ChunkHash::from_bits(u64::from_be_bytes(bits), self.names.has_sign),
                element: self.names.element,
                layer: None,
                tags: Vec::new(),
            },
            is_on_weka: self.is_on_weka,
            kind,
        };
        Ok(Location {
            folder: Some(place.folder()),
            name: place.name()?,
        })
    }
}

/// Returns whether a path is on WekaFS, or will be when it is made.
fn is_on_weka(system: &SystemView, path: &Path) -> bool {
    let existing = path.ancestors().find_map(|path| path.canonicalize().ok());
    let mount = existing.and_then(|path| Mount::of(system, &path));
    mount.is_some_and(|mount| mount.file_system == WEKA)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(model: &str, has_sign: bool) -> LmcacheNames {
        LmcacheNames {
            model: model.to_owned(),
            workers: 2,
            element: Element::Bf16,
            has_sign,
        }
    }

    fn tree(names: LmcacheNames) -> Result<LmcacheTree> {
        LmcacheTree::new(names, &SystemView::default(), Path::new("/not/there"))
    }

    #[test]
    fn a_key_is_a_number_with_or_without_a_sign() {
        let key = ChunkKey::from_bytes(&(-7936_i64).to_be_bytes()).unwrap();
        let found = tree(names("a/b", true)).unwrap().chunk(1, &key).unwrap();
        assert_eq!(
            found.below(),
            "-7/93/a%2Fb%402%401%40-1f00%40bfloat16.kvcache.safetensors"
        );
        let found = tree(names("a/b", false))
            .unwrap()
            .metadata(0, &key)
            .unwrap();
        assert_eq!(
            found.below(),
            "18/44/a%2Fb%402%400%40ffffffffffffe100%40bfloat16.kvcache.safetensors.metadata"
        );
    }

    #[test]
    fn what_has_no_name_is_refused() {
        assert!(tree(names(&"m".repeat(250), true)).is_err());
        assert!(tree(names("a@b", true)).is_err());
        let short = tree(names("m", true)).unwrap();
        let key = ChunkKey::from_bytes(&[1; 32]).unwrap();
        assert!(short.chunk(0, &key).is_err());
    }

    #[test]
    fn weka_is_found_in_the_list_of_mounts() {
        let root = tempfile::tempdir().unwrap();
        let system = SystemView {
            root: root.path().to_path_buf(),
        };
        let mounts = root.path().join("proc/self");
        std::fs::create_dir_all(&mounts).unwrap();
        let path = root.path().canonicalize().unwrap();
        let line = |kind: &str| format!("1 0 0:1 / {} rw - {kind} none rw\n", path.display());
        std::fs::write(mounts.join("mountinfo"), line("ext4")).unwrap();
        assert!(!is_on_weka(&system, &path.join("later")));
        std::fs::write(mounts.join("mountinfo"), line("wekafs")).unwrap();
        assert!(is_on_weka(&system, &path.join("later")));
        let tree = LmcacheTree::new(names("m", true), &system, &path.join("later")).unwrap();
        let key = ChunkKey::from_bytes(&[1; 8]).unwrap();
        assert!(tree.chunk(0, &key).unwrap().name.ends_with(".weka1"));
    }
}
