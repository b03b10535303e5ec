//! A file system that is soon full.

use std::path::Path;
use std::process::Command;

/// A small tmpfs of its own, unmounted when dropped.
pub struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    /// Mounts one of `mib` MiB; `None` where that is not allowed, which is printed.
    pub fn mount(mib: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(folder)),
            other => {
                eprintln!("skipped: a small file system needs the right to mount: {other:?}");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let done = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
        assert!(done.unwrap().success());
    }
}
