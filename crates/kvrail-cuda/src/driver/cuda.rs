//! The loaded driver and its devices.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::context::Context;
use super::sys::{Api, COMPUTE_CAPABILITY, Device};
use crate::error::{Error, ErrorKind, Result, check};
use crate::library::Loaded;

/// The CUDA driver, loaded and initialised. Clones share it.
#[derive(Debug, Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    api: Api,
    library: Loaded,
    version: c_int,
    devices: usize,
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The product's name.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: usize,
    /// Its place on the PCI bus, as `0000:65:00.0`.
    pub pci_bus_id: String,
    /// Major and minor version of its instruction set.
    pub compute_capability: (u32, u32),
}

impl Cuda {
    /// Loads the driver and initialises it.
    ///
    /// # Errors
    /// [`ErrorKind::LibraryMissing`], [`ErrorKind::SymbolMissing`], [`ErrorKind::NoDevice`] where
    /// there is no GPU, else what `cuInit` said.
    pub fn load(candidates: &[PathBuf]) -> Result<Self> {
        let library = Loaded::open(candidates)?;
        let api = Api::find(&library)?;
        // SAFETY: the flags must be zero.
        check("cuInit", unsafe { (api.init)(0) })?;
        let (mut version, mut devices) = (0, 0);
        // SAFETY: the pointer is to a live integer.
        check("cuDriverGetVersion", unsafe {
            (api.version)(&raw mut version)
        })?;
        // SAFETY: as above.
        check("cuDeviceGetCount", unsafe {
            (api.device_count)(&raw mut devices)
        })?;
        let devices = usize::try_from(devices).unwrap_or(0);
        if devices == 0 {
            let message = "the driver found no device";
            return Err(Error::new(ErrorKind::NoDevice, "cuDeviceGetCount", message));
        }
        let inner = Inner {
            api,
            library,
            version,
            devices,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Returns what the driver was loaded from.
    pub fn library(&self) -> &Path {
        self.inner.library.path()
    }

    /// Returns the version of CUDA that the driver supports: major, minor.
    pub fn driver_version(&self) -> (u32, u32) {
        let version = u32::try_from(self.inner.version).unwrap_or(0);
        (version / 1000, version % 1000 / 10)
    }

    /// Returns the number of devices; at least one.
    pub fn device_count(&self) -> usize {
        self.inner.devices
    }

    /// Returns what device `ordinal` says of itself.
    ///
    /// # Errors
    /// [`ErrorKind::NoDevice`] for a device that there is not, else what the driver said.
    pub fn device(&self, ordinal: usize) -> Result<DeviceInfo> {
        const NAME_BYTES: c_int = 256;
        let device = self.handle(ordinal)?;
        let mut name: [c_char; NAME_BYTES as usize] = [0; NAME_BYTES as usize];
        let mut bus: [c_char; NAME_BYTES as usize] = [0; NAME_BYTES as usize];
        let mut total_bytes = 0;
        let mut capability = [0; 2];
        // SAFETY: the buffer has the length that is passed.
        check("cuDeviceGetName", unsafe {
            (self.api().device_name)(name.as_mut_ptr(), NAME_BYTES, device)
        })?;
        // SAFETY: as above.
        check("cuDeviceGetPCIBusId", unsafe {
            (self.api().device_bus)(bus.as_mut_ptr(), NAME_BYTES, device)
        })?;
        // SAFETY: the pointer is to a live integer.
        check("cuDeviceTotalMem", unsafe {
            (self.api().device_memory)(&raw mut total_bytes, device)
        })?;
        for (value, attribute) in capability.iter_mut().zip(COMPUTE_CAPABILITY) {
            // SAFETY: as above.
            check("cuDeviceGetAttribute", unsafe {
                (self.api().device_attribute)(value, attribute, device)
            })?;
        }
        let [major, minor] = capability.map(|value| u32::try_from(value).unwrap_or(0));
        Ok(DeviceInfo {
            name: text(&name),
            total_bytes,
            pci_bus_id: text(&bus),
            compute_capability: (major, minor),
        })
    }

    /// Takes a hold on the primary context of a device: the one that PyTorch uses, too.
    ///
    /// # Errors
    /// As [`Cuda::device`].
    pub fn retain_primary(&self, ordinal: usize) -> Result<Context> {
        Context::retain(self.clone(), self.handle(ordinal)?, ordinal)
    }

    pub(crate) fn api(&self) -> &Api {
        &self.inner.api
    }

    fn handle(&self, ordinal: usize) -> Result<Device> {
        let mut device = 0;
        let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: the pointer is to a live integer.
        check("cuDeviceGet", unsafe {
            (self.api().device)(&raw mut device, number)
        })?;
        Ok(device)
    }
}

/// Returns the text before the first zero.
fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|byte| byte.to_ne_bytes()[0]).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::new(),
        |text| text.to_string_lossy().into_owned(),
    )
}
