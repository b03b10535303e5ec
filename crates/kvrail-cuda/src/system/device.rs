//! Block devices, from `/sys/dev/block`.

use std::path::{Path, PathBuf};

use super::mount::DeviceNumber;
use super::view::{self, SystemView};

/// What kind of device a block device is.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// An NVMe namespace.
    Nvme {
        /// How the controller is reached: `pcie`, `tcp`, `rdma`, `fc`. `None` where the kernel hides
        /// it behind its own multipath device.
        transport: Option<String>,
    },
    /// A volume of device-mapper: LVM, LUKS, multipath.
    DeviceMapper,
    /// A software RAID of md.
    Raid {
        /// As `raid0`.
        level: Option<String>,
        /// The names of the devices it is made of.
        members: Vec<String>,
    },
    /// A file that is mounted as a device.
    Loop,
    /// Anything else: SCSI, SATA, virtio, network block devices, memory.
    Other,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// The kernel's name of it, as `nvme0n1p2`.
    pub name: String,
    /// The name of the whole device, as `nvme0n1`.
    pub disk: String,
    /// What kind it is.
    pub kind: DeviceKind,
    /// Whether udev has a record of it (`/run/udev/data/b<number>`). cuFile looks devices up there,
    /// and a container has none by itself.
    pub has_udev_record: bool,
}

impl BlockDevice {
    /// Reads a device; `None` for a number that belongs to no block device, as those of file
    /// systems without one.
    pub fn read(view: &SystemView, number: DeviceNumber) -> Option<Self> {
        let folder = view.path(format!("/sys/dev/block/{number}"));
        let folder = folder.canonicalize().ok()?;
        let whole = match folder.join("partition").exists() {
            true => folder.parent()?.to_path_buf(),
            false => folder.clone(),
        };
        let (name, disk) = (name_of(&folder)?, name_of(&whole)?);
        Some(Self {
            kind: kind(&whole, &disk),
            has_udev_record: view.exists(udev_record(number)),
            name,
            disk,
        })
    }
}

/// Returns where udev keeps what it knows of a block device.
pub(super) fn udev_record(number: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/run/udev/data/b{number}"))
}

fn name_of(folder: &Path) -> Option<String> {
    Some(folder.file_name()?.to_string_lossy().into_owned())
}

fn kind(whole: &Path, disk: &str) -> DeviceKind {
    let read = |name: &str| view::line(&whole.join(name));
    let has = |name: &str| whole.join(name).exists();
    if has("dm") || disk.starts_with("dm-") {
        DeviceKind::DeviceMapper
    } else if has("md") {
        DeviceKind::Raid {
            level: read("md/level"),
            members: view::names(&whole.join("slaves")),
        }
    } else if has("loop") || disk.starts_with("loop") {
        DeviceKind::Loop
    } else if disk.starts_with("nvme") {
        DeviceKind::Nvme {
            transport: read("device/transport"),
        }
    } else {
        DeviceKind::Other
    }
}
