//! P2PDMA: the kernel's own way to let NVMe devices reach GPU memory, without nvidia-fs.

use super::driver::NvidiaDriver;
use super::gpu::Gpu;
use super::kernel::{KernelRelease, has_p2pdma_support};
use super::view::SystemView;

/// NVIDIA's requirements for P2PDMA (GDS support for NVMe, docs.nvidia.com): kernel and driver.
const KERNEL_MIN: (u32, u32) = (6, 2);
const DRIVER_BRANCH_MIN: u32 = 565;
const ARCHITECTURE: &str = "x86_64";
/// Settings that make the driver give BAR1 to the kernel: it must be mapped as a whole and not
/// write-combined.
const REGISTRY_DWORDS: [&str; 2] = ["RMForceStaticBar1", "RmForceDisableIomapWC"];

/// Whether P2PDMA can be used, and what it lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct P2pdma {
    /// Whether the driver has given a GPU's memory to the kernel for it already: then it works.
    pub is_registered: bool,
    /// What is missing, in words; empty where nothing is known to be.
    pub missing: Vec<String>,
}

impl P2pdma {
    /// Finds out.
    pub fn read(view: &SystemView) -> Self {
        let is_registered = Gpu::list(view)
            .iter()
            .any(|gpu| gpu.p2pdma_bytes.is_some_and(|bytes| bytes > 0));
        let missing = match is_registered {
            true => Vec::new(),
            false => missing(view),
        };
        Self {
            is_registered,
            missing,
        }
    }

    /// Returns whether nothing is known to be missing.
    pub fn is_possible(&self) -> bool {
        self.missing.is_empty()
    }
}

/// Lists what is missing. What cannot be seen counts as missing.
fn missing(view: &SystemView) -> Vec<String> {
    let mut missing = Vec::new();
    let (major, minor) = KERNEL_MIN;
    match KernelRelease::read(view) {
        Some(kernel) if kernel.version >= KERNEL_MIN => {}
        Some(kernel) => missing.push(format!("kernel {kernel} is older than {major}.{minor}")),
        None => missing.push("the kernel's release cannot be read".to_owned()),
    }
    let Some(driver) = NvidiaDriver::read(view) else {
        missing.push("no NVIDIA driver is loaded".to_owned());
        return missing;
    };
    if !driver.open {
        missing.push("the NVIDIA kernel modules are not the open ones".to_owned());
    }
    if driver
        .branch()
        .is_none_or(|branch| branch < DRIVER_BRANCH_MIN)
    {
        let version = &driver.version;
        missing.push(format!(
            "NVIDIA driver {version} is older than {DRIVER_BRANCH_MIN}"
        ));
    }
    if let Some(architecture) = driver
        .architecture
        .as_deref()
        .filter(|&a| a != ARCHITECTURE)
    {
        missing.push(format!("{architecture} is not {ARCHITECTURE}"));
    }
    for key in REGISTRY_DWORDS {
        if driver.registry_dword(key).is_none_or(|value| value == 0) {
            missing.push(format!("NVreg_RegistryDwords lacks {key}=1"));
        }
    }
    // Last, since the names of a kernel's functions are some ten MB of text.
    match has_p2pdma_support(view) {
        Some(true) => {}
        Some(false) => missing.push("the kernel was built without CONFIG_PCI_P2PDMA".to_owned()),
        None => missing.push("whether the kernel has CONFIG_PCI_P2PDMA cannot be seen".to_owned()),
    }
    missing
}
