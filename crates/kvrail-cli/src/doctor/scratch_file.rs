//! The file that doctor writes, gone again whatever happens.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// File systems that are not known to keep a file whose name was removed until it is closed.
const KEEPS_NOTHING: [&str; 5] = ["fuse", "9p", "cifs", "unknown", "gpfs"];

/// A name in a directory that no other run uses; removed when dropped.
#[derive(Debug)]
pub(super) struct ScratchFile {
    path: PathBuf,
}

impl ScratchFile {
    /// Makes a name; the file is the caller's to create.
    pub(super) fn new(directory: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let host = rustix::system::uname();
        // The directory may be shared: processes of other hosts have the same numbers.
        let name = format!(
            ".kvrail-doctor-{}-{}-{count}",
            host.nodename().to_string_lossy().replace('/', "_"),
            std::process::id()
        );
        Self {
            path: directory.join(name),
        }
    }

    /// Returns the path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the name of the open file at once, where the file lives on without it, so that a run
    /// that is killed leaves nothing behind.
    pub(super) fn hide(&self, file_system: &str) {
        if !KEEPS_NOTHING
            .iter()
            .any(|name| file_system.starts_with(name))
        {
            drop(std::fs::remove_file(&self.path));
        }
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
    }
}
