//! nvidia-fs, the kernel module of GPUDirect Storage.

use super::view::SystemView;

const FOLDER: &str = "/proc/driver/nvidia-fs";
/// The first of the devices that cuFile opens.
pub(super) const DEVICE: &str = "/dev/nvidia-fs0";

/// The kernel module nvidia-fs, where it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvidiaFs {
    /// The version, as `2.26`.
    pub version: Option<String>,
    /// The devices that it made (`devcount`, 16 as a rule).
    pub device_count: Option<u32>,
    /// Whether `/dev/nvidia-fs0` is there; a container does not get it by itself.
    pub has_device: bool,
}

impl NvidiaFs {
    /// Reads it; `None` where the module is not loaded.
    pub fn read(view: &SystemView) -> Option<Self> {
        if !view.path(FOLDER).is_dir() {
            return None;
        }
        // "version: 2.26"
        let version = view.line(format!("{FOLDER}/version"));
        let version = version.map(|line| match line.split_once(':') {
            Some((_, value)) => value.trim().to_owned(),
            None => line,
        });
        Some(Self {
            version,
            device_count: view
                .line(format!("{FOLDER}/devcount"))
                .and_then(|line| line.parse().ok()),
            has_device: view.exists(DEVICE),
        })
    }
}
