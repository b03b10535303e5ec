//! The store's directory as somebody sees it who knows nothing of the store's own books.

use std::collections::HashSet;
use std::fmt;
use std::fs::{DirEntry, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::worker::{key, namespace};

/// The directory, without faults.
#[derive(Debug)]
pub(super) struct Outside {
    root: PathBuf,
    namespace: PathBuf,
}

/// What lies in it at one moment, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Look {
    /// Chunks, those in quarantine included.
    pub(super) chunks: u64,
    /// Temp files of chunks.
    pub(super) temporary: u64,
}

impl fmt::Display for Look {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chunks, temporary } = self;
        write!(out, "{chunks} bytes of chunks, {temporary} of temp files")
    }
}

impl Outside {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
            namespace: root.join(namespace().directory_name()),
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn namespace(&self) -> &Path {
        &self.namespace
    }

    /// Returns where a chunk's file is.
    pub(super) fn chunk_path(&self, index: u64) -> PathBuf {
        let name = key(index).to_string();
        self.namespace
            .join("g0r0")
            .join(&name[..3])
            .join(format!("{name}.safetensors"))
    }

    /// Adds up what there is.
    ///
    /// Files move from `tmp` to their place and from there to `quarantine`: looked at in this
    /// order, none is missed, and by its inode none is counted twice.
    pub(super) fn look(&self) -> Look {
        let mut seen = HashSet::new();
        let mut look = Look::default();
        for (entry, metadata) in files(&self.namespace.join("tmp")) {
            let is_chunk = entry.file_name().to_string_lossy().starts_with(".chunk.");
            if is_chunk && seen.insert(metadata.ino()) {
                look.temporary += metadata.len();
            }
        }
        let slices = std::fs::read_dir(self.namespace.join("g0r0"));
        let slices = slices.into_iter().flatten().flatten();
        let mut folders: Vec<PathBuf> = slices.map(|slice| slice.path()).collect();
        folders.push(self.namespace.join("quarantine"));
        for (entry, metadata) in folders.iter().flat_map(|folder| files(folder)) {
            if is_chunk_file(&entry.path()) && seen.insert(metadata.ino()) {
                look.chunks += metadata.len();
            }
        }
        look
    }

    /// Returns why a chunk was set aside, each time.
    pub(super) fn set_aside(&self, index: u64) -> Vec<String> {
        let chunk = format!("{}.safetensors.json", key(index));
        let folder = self.namespace.join("quarantine");
        let reasons = files(&folder).filter_map(|(entry, _)| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let reason = || std::fs::read_to_string(entry.path()).unwrap_or_default();
            name.ends_with(&chunk)
                .then(|| format!("{name}: {}", reason()))
        });
        reasons.collect()
    }

    /// Returns the chunks in quarantine.
    pub(super) fn quarantined(&self) -> usize {
        let files = files(&self.namespace.join("quarantine"));
        files
            .filter(|(entry, _)| is_chunk_file(&entry.path()))
            .count()
    }

    /// Returns the process that holds the janitor's lease, as the lease says.
    pub(super) fn janitor(&self) -> Option<u32> {
        let names = self.names(".kvrail").into_iter();
        let term = |name: &str| name.strip_prefix("janitor.")?.parse::<u64>().ok();
        let newest = names.max_by_key(|name| term(name))?;
        let content = std::fs::read_to_string(self.root.join(".kvrail").join(newest)).ok()?;
        let (holder, beat) = content.trim_end().split_once(' ')?;
        // `.account.HOST.PROCESS.START.NUMBER`
        let process = holder.split('.').nth(3)?.parse().ok()?;
        (beat != "released").then_some(process)
    }

    /// Returns the names in a folder below the root.
    pub(super) fn names(&self, below: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(below));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

fn is_chunk_file(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ending == "safetensors")
}

/// Lists the files in a folder that do not vanish meanwhile.
fn files(folder: &Path) -> impl Iterator<Item = (DirEntry, Metadata)> + use<> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let metadata = entry.metadata().ok()?;
        metadata.is_file().then_some((entry, metadata))
    })
}
