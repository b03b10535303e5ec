//! A store made of empty chunk files, for tests of what is removed.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kvrail::config::{MinFree, StoreConfig};
use kvrail::store::capacity::{JanitorSettings, JanitorTiming, Stamp, usage};

use crate::common::key;

pub const CHUNK_BYTES: u64 = 10_000;

/// A store of empty chunk files of one size.
pub struct Files {
    root: tempfile::TempDir,
}

impl Files {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let files = Self { root };
        std::fs::create_dir_all(files.namespace().join("tmp")).unwrap();
        std::fs::write(files.namespace().join("manifest.json"), "{}").unwrap();
        files
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn namespace(&self) -> PathBuf {
        self.root.path().join("m-0123456789abcdef")
    }

    pub fn path(&self, index: u64) -> PathBuf {
        let name = key(index).to_string();
        let folder = self.namespace().join("g0r0").join(&name[..3]);
        folder.join(format!("{name}.safetensors"))
    }

    /// Makes a chunk that was last used `age` ago.
    pub fn add(&self, index: u64, age: Duration, uses: u8) {
        let path = self.path(index);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = File::create(&path).unwrap();
        file.set_len(CHUNK_BYTES).unwrap();
        let at = (SystemTime::now() - age).duration_since(SystemTime::UNIX_EPOCH);
        let (seconds, nanoseconds) = Stamp::new(at.unwrap().as_millis() as i64, uses).time();
        let time = Duration::new(seconds as u64, nanoseconds as u32);
        file.set_modified(SystemTime::UNIX_EPOCH + time).unwrap();
    }

    pub fn has(&self, index: u64) -> bool {
        self.path(index).exists()
    }

    /// Returns what the accounts say.
    pub fn used(&self) -> u64 {
        usage(self.root()).unwrap().bytes.unwrap()
    }

    /// Counts the bytes of all chunk files.
    pub fn bytes(&self) -> u64 {
        walk(&self.namespace())
    }
}

/// Returns the bytes of all chunk files below a folder.
fn walk(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path()),
            _ if entry
                .path()
                .extension()
                .is_some_and(|ending| ending == "safetensors") =>
            {
                entry.metadata().map_or(0, |metadata| metadata.size())
            }
            _ => 0,
        })
        .sum()
}

/// What a janitor that never waits keeps to.
pub fn settings(max_size: u64) -> JanitorSettings {
    JanitorSettings {
        max_size: Some(max_size),
        min_free: MinFree::Bytes(0),
        timing: JanitorTiming {
            tick: Duration::from_millis(20),
            lease_limit: Duration::from_secs(30),
            pass: Duration::from_millis(1),
        },
        ..JanitorSettings::new(&StoreConfig::with_path("/"))
    }
}
