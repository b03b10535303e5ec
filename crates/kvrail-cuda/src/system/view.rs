//! The folder that holds `/proc`, `/sys`, `/run` and `/dev`.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// What is read of one file at most. The largest of interest is `mountinfo`: some hundred bytes a
/// mount, and the kernel allows 100,000 mounts (`fs.mount-max`).
const TEXT_BYTES_MAX: u64 = 32 << 20;

/// Entries that are read of one folder at most.
const ENTRIES_MAX: usize = 65_536;

/// A view of the machine through the folder `root`, which is `/` outside tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemView {
    /// The folder with `proc`, `sys`, `run`, `dev` and `boot` in it.
    pub root: PathBuf,
}

impl Default for SystemView {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/"),
        }
    }
}

impl SystemView {
    /// Returns the place of an absolute path of the machine below the root.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Returns whether a file, folder or device of this name is there.
    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// Opens a file of the machine for reading.
    pub(super) fn open(&self, path: impl AsRef<Path>) -> Option<File> {
        open(&self.path(path))
    }

    /// Returns a file's bytes, `None` where it cannot be read.
    pub(super) fn bytes(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        bytes(&self.path(path))
    }

    /// Returns a file's text, `None` where it cannot be read.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        Some(String::from_utf8_lossy(&self.bytes(path)?).into_owned())
    }

    /// Returns a file's first line, `None` where it is empty or cannot be read.
    pub(super) fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        line(&self.path(path))
    }

    /// Returns the names in a folder in order, none where it cannot be read.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        names(&self.path(path))
    }
}

/// Opens a file for reading; never waits for a FIFO's writer.
fn open(path: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    options.open(path).ok()
}

fn bytes(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = open(path)?.take(TEXT_BYTES_MAX);
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// As [`SystemView::line`], of a path that holds the view's root already.
pub(super) fn line(path: &Path) -> Option<String> {
    let text = bytes(path)?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// As [`SystemView::names`], of a path that holds the view's root already.
pub(super) fn names(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .take(ENTRIES_MAX)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
