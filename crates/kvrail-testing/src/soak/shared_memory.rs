//! The folder of the DRAM tier that some of the processes share.

use std::path::{Path, PathBuf};

/// The folder of one run, removed when dropped.
#[derive(Debug)]
pub(super) struct SharedMemory(PathBuf);

impl SharedMemory {
    /// The folder of a run in `folder`.
    pub(super) fn of_run(folder: &Path) -> Self {
        let name = folder.file_name().unwrap_or_default();
        Self(Path::new("/dev/shm").join(name))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // Where no process made it there is none.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Returns that folder for a process whose chunks lie in `path`, a folder of the run's; `None`,
/// with a line that says so, where nothing can be there.
pub(super) fn find(path: &Path) -> Option<PathBuf> {
    if !Path::new("/dev/shm").is_dir() {
        eprintln!("no shared DRAM tier: there is no /dev/shm");
        return None;
    }
    let run = path.parent()?.file_name()?;
    Some(Path::new("/dev/shm").join(run))
}
