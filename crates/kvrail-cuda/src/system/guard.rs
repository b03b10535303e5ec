//! What must hold before cuFile may be touched.
//!
//! cuFile is no better than plain system calls where it has no direct path, and on some machines
//! its driver never returns from being opened, or closes file descriptor 0 on its way out. So these
//! guards ask for a direct path that is known to work, and refuse where in doubt. They prove
//! nothing: after them the driver is tried in a process of its own, and each mount by writing to it.

use std::path::Path;

use super::device::{BlockDevice, DeviceKind, udev_record};
use super::mount::Mount;
use super::nvidia_fs::{DEVICE, NvidiaFs};
use super::p2pdma::P2pdma;
use super::refusal::{Refusal, RefusalKind};
use super::view::SystemView;

/// File systems on a block device to which cuFile has a direct path.
const LOCAL: [&str; 2] = ["ext4", "xfs"];
/// Network file systems to which it has one through nvidia-fs.
const NETWORK: [&str; 4] = ["lustre", "beegfs", "gpfs", "wekafs"];
/// File systems that keep their bytes in memory.
const MEMORY: [&str; 3] = ["tmpfs", "ramfs", "devtmpfs"];

/// Checks what must hold before cuFile may be touched for files in `directory`.
///
/// First the machine, then the directory's mount; the caller has made sure before that there is a
/// GPU with a driver. It reads the directory's path, so it can take as long as its mount does.
///
/// # Errors
/// The first reason to leave cuFile alone.
pub fn cufile_guards(view: &SystemView, directory: &Path) -> Result<(), Refusal> {
    machine_guards(view)?;
    let directory = directory.canonicalize().map_err(|error| {
        let reason = format!("`{}`: {error}", directory.display());
        Refusal::new(RefusalKind::DirectoryUnknown, reason)
    })?;
    mount_guards(view, &directory)
}

/// Checks what must hold for any directory.
///
/// # Errors
/// The first reason to leave cuFile alone.
pub fn machine_guards(view: &SystemView) -> Result<(), Refusal> {
    if view.bytes("/proc/modules").is_none() {
        let reason = "no /proc/modules: libcufile never returns from cuFileDriverOpen there";
        return Err(Refusal::new(RefusalKind::NoModules, reason));
    }
    match NvidiaFs::read(view) {
        Some(module) if module.has_device => Ok(()),
        // Whether P2PDMA would do does not matter: opening the driver is what fails here.
        Some(_) => {
            let reason = format!("/proc/driver/nvidia-fs is there but {DEVICE} is not");
            Err(Refusal::new(RefusalKind::NvidiaFsDeviceMissing, reason))
        }
        None => {
            let p2pdma = P2pdma::read(view);
            if p2pdma.is_possible() {
                return Ok(());
            }
            let missing = p2pdma.missing.join(", ");
            let reason = format!("neither nvidia-fs nor P2PDMA ({missing})");
            Err(Refusal::new(RefusalKind::NoDirectPath, reason))
        }
    }
}

/// Checks what must hold for the mount of `directory`, an absolute path without symbolic links.
///
/// Touches neither the directory nor its mount.
///
/// # Errors
/// The first reason to leave cuFile alone.
pub fn mount_guards(view: &SystemView, directory: &Path) -> Result<(), Refusal> {
    let Some(mount) = Mount::of(view, directory) else {
        let reason = format!("no mount is known for `{}`", directory.display());
        return Err(Refusal::new(RefusalKind::MountUnknown, reason));
    };
    let name = mount.family();
    if MEMORY.contains(&name) {
        let reason = format!("{name} has no device behind it");
        return Err(Refusal::new(RefusalKind::NoDevice, reason));
    }
    if matches!(name, "overlay" | "overlayfs" | "aufs") {
        let reason = format!("{name} is a container's own file system");
        return Err(Refusal::new(RefusalKind::Overlay, reason));
    }
    let has_nvidia_fs = NvidiaFs::read(view).is_some();
    if LOCAL.contains(&name) {
        return device_guards(view, &mount, has_nvidia_fs);
    }
    let is_nfs_over_rdma = matches!(name, "nfs" | "nfs4") && mount.has_option("proto=rdma");
    let reason = match name {
        _ if is_nfs_over_rdma || NETWORK.contains(&name) => match has_nvidia_fs {
            true => return Ok(()),
            false => format!("{name} has a direct path only with nvidia-fs"),
        },
        "nfs" | "nfs4" => format!("{name} has a direct path only over RDMA (option proto=rdma)"),
        _ => format!("{} is not known to have a direct path", mount.file_system),
    };
    Err(Refusal::new(RefusalKind::FileSystem, reason))
}

/// Checks a local file system and the device below it.
fn device_guards(view: &SystemView, mount: &Mount, has_nvidia_fs: bool) -> Result<(), Refusal> {
    let refuse = |kind, reason: String| Err(Refusal::new(kind, reason));
    if let Some(mode) = ["data=journal", "data=writeback"]
        .into_iter()
        .find(|mode| mount.has_option(mode))
    {
        let reason = format!("ext4 with {mode} has no direct path (data=ordered has)");
        return refuse(RefusalKind::FileSystem, reason);
    }
    let number = mount.device;
    let Some(device) = BlockDevice::read(view, number) else {
        let reason = format!("device {number} of this mount is not in /sys/dev/block");
        return refuse(RefusalKind::Device, reason);
    };
    let name = &device.name;
    match &device.kind {
        DeviceKind::Nvme { transport } if !has_nvidia_fs => {
            let multipath = view.line("/sys/module/nvme_core/parameters/multipath");
            if transport.as_deref() != Some("pcie") {
                let transport = transport.as_deref().unwrap_or("multipath");
                let reason =
                    format!("{name} is NVMe over {transport}, which P2PDMA does not reach");
                return refuse(RefusalKind::Device, reason);
            }
            if multipath.as_deref() == Some("Y") {
                let reason = "P2PDMA needs nvme_core.multipath=N".to_owned();
                return refuse(RefusalKind::Device, reason);
            }
        }
        DeviceKind::Nvme { .. } => {}
        // A linear volume on one NVMe device might work, and the same names hide striping,
        // encryption and multipath.
        DeviceKind::DeviceMapper => {
            let reason = format!("{name} is a device-mapper volume (LVM, LUKS or multipath)");
            return refuse(RefusalKind::DeviceMapper, reason);
        }
        DeviceKind::Raid { level, members } => {
            let level = level.as_deref().unwrap_or("a RAID of unknown level");
            let is_all_nvme = !members.is_empty() && members.iter().all(|m| m.starts_with("nvme"));
            if !(has_nvidia_fs && level == "raid0" && is_all_nvme) {
                let members = members.join(", ");
                let reason = format!(
                    "{name} is {level} of {members}: only RAID 0 of NVMe with nvidia-fs is known to work"
                );
                return refuse(RefusalKind::Raid, reason);
            }
        }
        DeviceKind::Loop => {
            let reason = format!("{name} is a file mounted as a device");
            return refuse(RefusalKind::Device, reason);
        }
        DeviceKind::Other => {
            return refuse(RefusalKind::Device, format!("{name} is not an NVMe device"));
        }
    }
    if !device.has_udev_record {
        let record = udev_record(number);
        let reason = format!(
            "no udev record for this mount's device {number} ({}): running in a container?",
            record.display()
        );
        return refuse(RefusalKind::NoUdevRecord, reason);
    }
    Ok(())
}
