//! The GPU that is measured, and what the machine says of itself beside it.

use std::io::{self, Write};
use std::str::FromStr;

use kvrail::OpenOptions;
use kvrail::memory::Gpu;
use kvrail_cuda::system::{KernelRelease, NvidiaDriver};
use kvrail_cuda::{CuFile, Cuda, ErrorKind};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::human_bytes;

/// What the KV cache of a benchmark lies on: `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// Memory of the host.
    Cpu,
    /// Memory of the GPU with this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok()),
        };
        let expected = || "expected cpu, cuda or cuda:N".to_owned();
        ordinal.map(Self::Cuda).ok_or_else(expected)
    }
}

/// What is known of the GPU and its machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DeviceReport {
    name: String,
    ordinal: usize,
    memory_bytes: u64,
    pci_address: String,
    compute_capability: String,
    /// The version of CUDA that the driver supports.
    cuda_version: String,
    /// The version of NVIDIA's kernel driver, where it is loaded.
    driver_version: Option<String>,
    kernel: Option<String>,
    cpus: Option<usize>,
    libcufile_version: Option<String>,
}

/// Opens a GPU.
pub(crate) fn open(ordinal: usize, options: &OpenOptions) -> Result<(Gpu, DeviceReport), Failure> {
    let (libraries, view) = (&options.libraries, &options.system);
    let cuda = Cuda::load(&libraries.cuda).map_err(|error| explain(ordinal, &error))?;
    let info = cuda.device(ordinal).map_err(|error| {
        let count = cuda.device_count();
        let failure = Failure::new(format!("cuda:{ordinal}: {error}"));
        failure.with_hint(format!("the driver has {count} devices, from cuda:0 on"))
    })?;
    let gpu = Gpu::open(&cuda, ordinal)
        .map_err(|error| Failure::from(error).with_hint("is another process using the GPU?"))?;
    let text = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    let cufile = CuFile::load(&libraries.cufile).ok();
    let report = DeviceReport {
        name: info.name,
        ordinal,
        memory_bytes: info.total_bytes as u64,
        pci_address: info.pci_bus_id.to_ascii_lowercase(),
        compute_capability: text(info.compute_capability),
        cuda_version: text(cuda.driver_version()),
        driver_version: NvidiaDriver::read(view).map(|driver| driver.version),
        kernel: KernelRelease::read(view).map(|kernel| kernel.text),
        cpus: std::thread::available_parallelism().map(usize::from).ok(),
        libcufile_version: cufile.and_then(|library| library.version()).map(text),
    };
    Ok((gpu, report))
}

/// Says what is missing, and what to do about it.
fn explain(ordinal: usize, error: &kvrail_cuda::Error) -> Failure {
    let failure = Failure::new(format!("cuda:{ordinal}: {error}"));
    match error.kind() {
        ErrorKind::LibraryMissing => failure.with_hint(
            "NVIDIA's driver is not installed, or a container does not see it; `kvrail doctor` \
             tells more, and --device cpu needs no GPU",
        ),
        ErrorKind::NoDevice => failure.with_hint(
            "the driver is there, but no GPU (CUDA_VISIBLE_DEVICES?); --device cpu needs none",
        ),
        _ => failure.with_hint("`kvrail doctor` tells more of driver and GPUs"),
    }
}

impl DeviceReport {
    /// Writes it in a line.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
        writeln!(
            out,
            "cuda:{} {} ({}, {}), compute capability {}; CUDA {}, driver {}, kernel {}, libcufile {}",
            self.ordinal,
            self.name,
            human_bytes(self.memory_bytes),
            self.pci_address,
            self.compute_capability,
            self.cuda_version,
            or_unknown(&self.driver_version),
            or_unknown(&self.kernel),
            self.libcufile_version.as_deref().unwrap_or("none"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_pytorch_names_them() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:11".parse(), Ok(Device::Cuda(11)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
    }
}
