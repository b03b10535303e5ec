//! The machine: driver, GPUs, libraries, and the ways between GPU memory and storage.

use std::path::Path;
use std::time::Duration;

use kvrail::io::within;
use kvrail_cuda::system::{
    Gpu, KernelRelease, NvidiaDriver, NvidiaFs, P2pdma, Refusal, SystemView, container_evidence,
    machine_guards,
};
use serde::Serialize;

use super::advice;
use super::libraries::{CudaLibrary, CufileLibrary, find_cuda, find_cufile};

/// What was found out about the machine.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    pub(super) system: System,
    pub(super) libcuda: Found<CudaLibrary>,
    pub(super) libcufile: Found<CufileLibrary>,
    /// How bytes could get between GPU memory and storage.
    pub(super) path: DirectPath,
    /// What to change, one sentence each.
    pub(super) advice: Vec<String>,
}

/// What the kernel shows.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct System {
    pub(super) kernel: Option<String>,
    /// What shows that this is a container.
    pub(super) container: Option<String>,
    pub(super) driver: Option<Driver>,
    pub(super) gpus: Vec<GpuDevice>,
    pub(super) nvidia_fs: Option<NvidiaFsModule>,
    pub(super) p2pdma: Peer,
    /// Why cuFile is left alone on this machine, whatever the directory.
    pub(super) refusal: Option<RefusalReport>,
    /// Why the kernel's files could not be read.
    pub(super) error: Option<String>,
}

/// NVIDIA's kernel driver.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Driver {
    pub(super) version: String,
    pub(super) open: bool,
    registry_dwords: Option<String>,
}

/// A GPU on the bus.
#[derive(Debug, Clone, Serialize)]
pub(super) struct GpuDevice {
    pub(super) pci_address: String,
    pub(super) model: Option<String>,
    pub(super) has_driver: bool,
    pub(super) bar1_bytes: Option<u64>,
    p2pdma_bytes: Option<u64>,
}

/// The kernel module of GPUDirect Storage.
#[derive(Debug, Clone, Serialize)]
pub(super) struct NvidiaFsModule {
    pub(super) version: Option<String>,
    device_count: Option<u32>,
    pub(super) has_device: bool,
}

/// The kernel's own way between NVMe and GPU.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Peer {
    pub(super) possible: bool,
    registered: bool,
    pub(super) missing: Vec<String>,
}

/// Why cuFile is left alone.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RefusalReport {
    /// For programs.
    pub(super) kind: &'static str,
    pub(super) reason: String,
    pub(super) advice: &'static str,
}

impl From<Refusal> for RefusalReport {
    fn from(refusal: Refusal) -> Self {
        Self {
            kind: refusal.kind().name(),
            reason: refusal.to_string(),
            advice: refusal.kind().advice(),
        }
    }
}

/// A library, or why there is none.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Found<T> {
    Library(T),
    Error(String),
}

impl<T> Found<T> {
    pub(super) fn library(&self) -> Option<&T> {
        match self {
            Self::Library(library) => Some(library),
            Self::Error(_) => None,
        }
    }
}

impl<T> From<Result<T, String>> for Found<T> {
    fn from(result: Result<T, String>) -> Self {
        match result {
            Ok(library) => Self::Library(library),
            Err(error) => Self::Error(error),
        }
    }
}

/// How bytes could get between GPU memory and storage with cuFile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum DirectPath {
    /// Through the kernel module nvidia-fs.
    #[serde(rename = "nvidia-fs")]
    NvidiaFs,
    /// Through the kernel's P2PDMA.
    #[serde(rename = "p2pdma")]
    P2pdma,
    /// Only through host memory, inside cuFile.
    #[serde(rename = "compat")]
    Compat,
    /// Not at all: no GPU or no library.
    #[serde(rename = "none")]
    None,
}

impl Machine {
    /// Finds out about the machine; each step takes `limit` at most.
    pub(super) fn examine(view: &SystemView, cufile: Option<&Path>, limit: Duration) -> Self {
        let seen = view.clone();
        let system =
            within(limit, "the system", move || System::read(&seen)).unwrap_or_else(|error| {
                System {
                    error: Some(error.to_string()),
                    ..System::default()
                }
            });
        let libcuda = Found::from(find_cuda(limit));
        let libcufile = Found::from(find_cufile(cufile, limit));
        let path = match &system {
            _ if libcuda.library().is_none() || libcufile.library().is_none() => DirectPath::None,
            System {
                refusal: Some(_), ..
            }
            | System { error: Some(_), .. } => DirectPath::Compat,
            System {
                nvidia_fs: Some(_), ..
            } => DirectPath::NvidiaFs,
            _ => DirectPath::P2pdma,
        };
        let mut machine = Self {
            system,
            libcuda,
            libcufile,
            path,
            advice: Vec::new(),
        };
        machine.advice = advice::for_machine(&machine);
        machine
    }
}

impl System {
    fn read(view: &SystemView) -> Self {
        let p2pdma = P2pdma::read(view);
        Self {
            kernel: KernelRelease::read(view).map(|kernel| kernel.text),
            container: container_evidence(view),
            driver: NvidiaDriver::read(view).map(|driver| Driver {
                version: driver.version,
                open: driver.open,
                registry_dwords: driver.registry_dwords,
            }),
            gpus: Gpu::list(view).into_iter().map(GpuDevice::from).collect(),
            nvidia_fs: NvidiaFs::read(view).map(|module| NvidiaFsModule {
                version: module.version,
                device_count: module.device_count,
                has_device: module.has_device,
            }),
            p2pdma: Peer {
                possible: p2pdma.is_possible(),
                registered: p2pdma.is_registered,
                missing: p2pdma.missing,
            },
            refusal: machine_guards(view).err().map(RefusalReport::from),
            error: None,
        }
    }
}

impl From<Gpu> for GpuDevice {
    fn from(gpu: Gpu) -> Self {
        Self {
            pci_address: gpu.pci_address,
            model: gpu.model,
            has_driver: gpu.has_driver,
            bar1_bytes: gpu.bar1_bytes,
            p2pdma_bytes: gpu.p2pdma_bytes,
        }
    }
}
