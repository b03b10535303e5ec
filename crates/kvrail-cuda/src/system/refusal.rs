//! Why cuFile is not touched.

use std::fmt;

/// Why cuFile is not touched, for programs.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalKind {
    /// `/proc/modules` cannot be read.
    NoModules,
    /// nvidia-fs is loaded, but its device is not here.
    NvidiaFsDeviceMissing,
    /// Neither nvidia-fs nor P2PDMA.
    NoDirectPath,
    /// The directory does not exist, or cannot be reached.
    DirectoryUnknown,
    /// No mount is known for the directory.
    MountUnknown,
    /// A file system without a device: tmpfs and the like.
    NoDevice,
    /// A container's layered file system.
    Overlay,
    /// A file system that is not known to have a direct path.
    FileSystem,
    /// LVM, LUKS, multipath.
    DeviceMapper,
    /// A software RAID that is not known to have a direct path.
    Raid,
    /// A block device that is not known to have a direct path.
    Device,
    /// udev has no record of the device.
    NoUdevRecord,
}

impl RefusalKind {
    /// Returns the name for machines, as `no_proc_modules`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoModules => "no_proc_modules",
            Self::NvidiaFsDeviceMissing => "nvidia_fs_device_missing",
            Self::NoDirectPath => "no_direct_path",
            Self::DirectoryUnknown => "directory_unknown",
            Self::MountUnknown => "mount_unknown",
            Self::NoDevice => "no_device",
            Self::Overlay => "overlay",
            Self::FileSystem => "file_system",
            Self::DeviceMapper => "device_mapper",
            Self::Raid => "raid",
            Self::Device => "device",
            Self::NoUdevRecord => "no_udev_record",
        }
    }

    /// Returns what a user can change, as one line.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NoModules => {
                "cuFile needs a kernel with loadable modules, and /proc as the kernel shows it"
            }
            Self::NvidiaFsDeviceMissing => {
                "give the container /dev/nvidia-fs* and /run/udev (NVIDIA Container Toolkit: NVIDIA_GDS=enabled)"
            }
            Self::NoDirectPath => {
                "load nvidia-fs (package nvidia-gds), or set the machine up for P2PDMA: kernel 6.2, open NVIDIA driver 565, NVreg_RegistryDwords=\"RMForceStaticBar1=1;RmForceDisableIomapWC=1\""
            }
            Self::DirectoryUnknown => "give a directory that exists and can be entered",
            Self::MountUnknown => "mount /proc",
            Self::NoDevice => "use a directory on an NVMe device with ext4 or xfs",
            Self::Overlay => "mount a volume of the host into the container: ext4 or xfs on NVMe",
            Self::FileSystem => {
                "use ext4 or xfs on NVMe, or Lustre, BeeGFS, GPFS, WekaFS or NFS over RDMA"
            }
            Self::DeviceMapper => {
                "use the NVMe device or its partition itself, without LVM, LUKS or multipath"
            }
            Self::Raid => "use md RAID 0 of NVMe devices with nvidia-fs, or a single NVMe device",
            Self::Device => "use a local NVMe device",
            Self::NoUdevRecord => {
                "mount the host's /run/udev into the container, read-only (-v /run/udev:/run/udev:ro)"
            }
        }
    }
}

/// A reason why cuFile is not touched. Displayed in words, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    kind: RefusalKind,
    reason: String,
}

impl Refusal {
    pub(super) fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
        }
    }

    /// Returns the reason for programs.
    pub fn kind(&self) -> RefusalKind {
        self.kind
    }

    /// Returns the reason in words.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.reason)
    }
}

impl std::error::Error for Refusal {}
