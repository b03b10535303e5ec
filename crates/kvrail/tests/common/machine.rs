//! A machine on which cuFile may be tried, as files in a folder.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::path::{Path, PathBuf};

use kvrail_cuda::system::SystemView;

/// A machine with an NVMe disk at `/` (ext4), udev's record of it, and nvidia-fs.
pub struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    pub fn direct() -> Self {
        const NVME: &str = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0";
        let machine = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let disk = format!("{NVME}/nvme0n1");
        for (path, text) in [
            ("proc/modules", "nvme 1 2 - Live 0x0\n"),
            ("proc/sys/kernel/osrelease", "6.8.0-51-generic\n"),
            ("proc/driver/nvidia-fs/version", "version: 2.26\n"),
            ("dev/nvidia-fs0", ""),
            ("run/udev/data/b259:2", "E:ID_FS_TYPE=ext4\n"),
            (&format!("{NVME}/transport"), "pcie\n"),
            (&format!("{disk}/nvme0n1p2/partition"), "2\n"),
        ] {
            machine.file(path, text);
        }
        machine.mount("22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n");
        machine.link(&format!("{disk}/device"), "../../nvme0");
        machine.link("sys/dev/block/259:2", format!("../../../{disk}/nvme0n1p2"));
        machine
    }

    /// Makes it one without nvidia-fs that is set up for P2PDMA.
    pub fn with_p2pdma_only(&self) {
        self.without("proc/driver/nvidia-fs");
        for (path, text) in [
            (
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n",
            ),
            (
                "proc/driver/nvidia/params",
                "RegistryDwords: \"RMForceStaticBar1=1;RmForceDisableIomapWC=1;\"\n",
            ),
            ("boot/config-6.8.0-51-generic", "CONFIG_PCI_P2PDMA=y\n"),
        ] {
            self.file(path, text);
        }
    }

    pub fn view(&self) -> SystemView {
        SystemView {
            root: self.folder.path().to_path_buf(),
        }
    }

    /// Sets what is mounted at `/`.
    pub fn mount(&self, line: &str) {
        self.file("proc/self/mountinfo", line);
    }

    pub fn without(&self, path: &str) {
        let path = self.folder.path().join(path);
        match path.is_dir() {
            true => std::fs::remove_dir_all(path).unwrap(),
            false => std::fs::remove_file(path).unwrap(),
        }
    }

    fn place(&self, path: &str) -> PathBuf {
        let path = self.folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(&self, path: &str, text: &str) {
        std::fs::write(self.place(path), text).unwrap();
    }

    fn link(&self, path: &str, target: impl AsRef<Path>) {
        std::os::unix::fs::symlink(target, self.place(path)).unwrap();
    }
}
