//! Trees of machines.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::super::SystemView;

/// A machine as files in a folder.
pub(super) struct Machine {
    pub(super) folder: TempDir,
}

const NVME: &str = "devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1";
pub(super) const DWORDS: &str = "RMForceStaticBar1=1;RmForceDisableIomapWC=1;";
pub(super) const OPEN_DRIVER: &str =
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x@y)\n";

impl Machine {
    /// A machine with nothing to read.
    pub(super) fn bare() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A machine with an NVMe disk at `/` (ext4) and the modules list; no GPU.
    pub(super) fn with_nvme() -> Self {
        Self::bare()
            .file("proc/modules", "nvme 1 2 - Live 0x0\n")
            .file("proc/sys/kernel/osrelease", "6.8.0-51-generic\n")
            .mounts("22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n")
            .nvme("pcie")
            .file("run/udev/data/b259:2", "E:ID_FS_TYPE=ext4\n")
    }

    /// The above with nvidia-fs.
    pub(super) fn with_nvidia_fs() -> Self {
        Self::with_nvme()
            .file("proc/driver/nvidia-fs/version", "version: 2.26\n")
            .file("proc/driver/nvidia-fs/devcount", "16\n")
            .file("dev/nvidia-fs0", "")
    }

    /// The NVMe machine set up for P2PDMA.
    pub(super) fn with_p2pdma() -> Self {
        Self::with_nvme()
            .file("boot/config-6.8.0-51-generic", "CONFIG_PCI_P2PDMA=y\n")
            .file("proc/driver/nvidia/version", OPEN_DRIVER)
            .params(DWORDS)
    }

    pub(super) fn params(self, dwords: &str) -> Self {
        let text = format!("ResmanDebugLevel: 4294967295\nRegistryDwords: \"{dwords}\"\n");
        self.file("proc/driver/nvidia/params", &text)
    }

    pub(super) fn nvme(self, transport: &str) -> Self {
        let controller = Path::new("/sys").join(NVME).parent().unwrap().to_path_buf();
        self.file(&format!("sys/{NVME}/nvme0n1p2/partition"), "2\n")
            .file(controller.join("transport").to_str().unwrap(), transport)
            .link(&format!("sys/{NVME}/device"), "../../nvme0")
            .link("sys/dev/block/259:2", &format!("../../{NVME}/nvme0n1p2"))
    }

    /// Adds a whole device with folders in it, and `/` on it.
    pub(super) fn disk(self, name: &str, files: &[(&str, &str)]) -> Self {
        let mut machine = self
            .mounts(&format!("22 1 9:7 / / rw - xfs /dev/{name} rw\n"))
            .file("run/udev/data/b9:7", "")
            .file(&format!("sys/devices/virtual/block/{name}/size"), "8\n")
            .link(
                "sys/dev/block/9:7",
                &format!("../../devices/virtual/block/{name}"),
            );
        for (file, text) in files {
            machine = machine.file(&format!("sys/devices/virtual/block/{name}/{file}"), text);
        }
        machine
    }

    pub(super) fn mounts(self, text: &str) -> Self {
        self.file("proc/self/mountinfo", text)
    }

    fn place(&self, path: &str) -> PathBuf {
        let path = self.folder.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    pub(super) fn file(self, path: &str, text: &str) -> Self {
        std::fs::write(self.place(path), text).unwrap();
        self
    }

    pub(super) fn link(self, path: &str, target: &str) -> Self {
        symlink(target, self.place(path)).unwrap();
        self
    }

    pub(super) fn without(self, path: &str) -> Self {
        let path = self.place(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        self
    }

    pub(super) fn view(&self) -> SystemView {
        SystemView {
            root: self.folder.path().to_path_buf(),
        }
    }
}
