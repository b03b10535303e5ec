//! The loaded library, its opened driver, and memory registered with it.
#![expect(unsafe_code, reason = "calls cuFile")]

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use super::calls::{Call, wait_at_exit};
use super::check;
use super::file::FileHandle;
use super::settings::DriverSettings;
use super::sys::Api;
use crate::driver::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Loaded;

/// The largest transfer that cuFile makes in one piece (cuFile API reference,
/// `max_direct_io_size_kb`).
pub const TRANSFER_BYTES_MAX: usize = 16 << 20;

/// The library, loaded; its driver is not opened.
#[derive(Debug, Clone)]
pub struct CuFile {
    inner: Arc<Library>,
}

#[derive(Debug)]
pub(super) struct Library {
    pub(super) api: Api,
    library: Loaded,
}

impl CuFile {
    /// Loads the library.
    ///
    /// # Errors
    /// [`ErrorKind::LibraryMissing`](crate::ErrorKind::LibraryMissing) or
    /// [`ErrorKind::SymbolMissing`](crate::ErrorKind::SymbolMissing).
    pub fn load(candidates: &[PathBuf]) -> Result<Self> {
        let library = Loaded::open(candidates)?;
        let api = Api::find(&library)?;
        Ok(Self {
            inner: Arc::new(Library { api, library }),
        })
    }

    /// Returns what the library was loaded from.
    pub fn library(&self) -> &Path {
        self.inner.library.path()
    }

    /// Returns the version, major and minor, where the library tells it (1.14 is `(1, 14)`).
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut version = 0;
        let function = self.inner.api.version?;
        // SAFETY: the pointer is to a live integer.
        check("cuFileGetVersion", unsafe { function(&raw mut version) }).ok()?;
        let version = u32::try_from(version).ok()?;
        Some((version / 1000, version % 1000 / 10))
    }

    /// Returns whether one call can move many pieces of memory (cuFile 1.20 and later).
    pub fn has_vectored(&self) -> bool {
        self.inner.api.read_vectored.is_some() && self.inner.api.write_vectored.is_some()
    }

    /// Opens the driver with settings of ours.
    ///
    /// # Errors
    /// As [`CuFile::open_driver`].
    pub fn open_driver_with(
        &self,
        context: &Context,
        settings: DriverSettings,
    ) -> Result<CuFileDriver> {
        let device_bytes = context.memory_info().ok().map(|(_, total)| total);
        settings.apply(&self.inner.api, device_bytes);
        self.open_driver(context)
    }

    /// Opens the driver, with the library's own settings. `context` is current then and when it is
    /// closed: without one, the library does not unregister its pinned memory before it frees it.
    ///
    /// It may never return: libcufile (1.11 to 1.20 tried) spins where `/proc/modules` does not
    /// exist.
    /// Try it in a child process first.
    ///
    /// # Errors
    /// What the library said.
    pub fn open_driver(&self, context: &Context) -> Result<CuFileDriver> {
        let _call = Call::begin().ok_or_else(|| exiting("cuFileDriverOpen"))?;
        context.run(|| {
            // SAFETY: the call has no arguments.
            check("cuFileDriverOpen", unsafe {
                (self.inner.api.driver_open)()
            })
        })?;
        wait_at_exit();
        Ok(CuFileDriver {
            inner: Arc::new(Opened {
                library: Arc::clone(&self.inner),
                context: context.clone(),
                process: std::process::id(),
            }),
        })
    }
}

/// The opened driver; closed when the last clone, file and buffer is dropped.
#[derive(Debug, Clone)]
pub struct CuFileDriver {
    inner: Arc<Opened>,
}

#[derive(Debug)]
struct Opened {
    library: Arc<Library>,
    context: Context,
    /// The process that opened it. After a fork the driver's state is undefined in the child
    /// (cuFile best practices), so nothing of it is used there.
    process: u32,
}

impl CuFileDriver {
    pub(super) fn api(&self) -> &Api {
        &self.inner.library.api
    }

    /// Begins a call that gives back what cuFile has; `None` where it is not to be called any more.
    pub(super) fn begin_end(&self) -> Option<Call> {
        self.inner.begin_end()
    }

    /// Begins a call; refuses it in a process that was forked off, and in one that ends.
    pub(super) fn begin(&self, operation: &'static str) -> Result<Call> {
        if !self.inner.is_ours() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                operation,
                "the driver was opened by the process that this one was forked from",
            ));
        }
        Call::begin().ok_or_else(|| exiting(operation))
    }

    /// Returns whether one call can move many pieces of memory.
    pub fn has_vectored(&self) -> bool {
        let api = self.api();
        api.read_vectored.is_some() && api.write_vectored.is_some()
    }

    /// Registers an open file. The file must stay open as long as the handle lives.
    ///
    /// # Errors
    /// What the library said: 5019 for a file opened with `O_NOFOLLOW`, `O_NONBLOCK` or `O_APPEND`,
    /// 5027 without a udev record, 5030 in many containers.
    pub fn register_file(&self, file: BorrowedFd<'_>) -> Result<FileHandle> {
        FileHandle::register(self.clone(), file)
    }

    /// Registers `bytes` bytes of memory of a context's device, until the value is dropped.
    ///
    /// The library answers 5011 (CUDA 201) on a thread where no context is current, so this makes
    /// `context` current; its other calls look up the memory's own.
    ///
    /// # Safety
    /// The memory stays allocated until then.
    ///
    /// # Errors
    /// What the library said: 5036 when the memory cannot be pinned for I/O.
    pub unsafe fn register_buffer(
        &self,
        context: &Context,
        address: u64,
        bytes: usize,
    ) -> Result<RegisteredBuffer> {
        let _call = self.begin("cuFileBufRegister")?;
        let start = pointer(address);
        context.run(|| {
            // SAFETY: the caller vouches for the range; the flags must be zero.
            let status = unsafe { (self.api().register_buffer)(start, bytes, 0) };
            check("cuFileBufRegister", status)
        })?;
        Ok(RegisteredBuffer {
            driver: self.clone(),
            context: context.clone(),
            address,
        })
    }
}

impl Opened {
    fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    fn begin_end(&self) -> Option<Call> {
        self.is_ours().then(Call::begin).flatten()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(_call) = self.begin_end() else {
            return;
        };
        let api = &self.library.api;
        if let Some(close) = api.driver_close_v2.or(api.driver_close) {
            let _ = self.context.run(|| {
                // SAFETY: the driver was opened by us, and nothing of it is in use any more.
                check("cuFileDriverClose", unsafe { close() })
            });
        }
    }
}

/// Memory that cuFile knows, until this is dropped.
#[derive(Debug)]
pub struct RegisteredBuffer {
    driver: CuFileDriver,
    context: Context,
    address: u64,
}

impl Drop for RegisteredBuffer {
    fn drop(&mut self) {
        let Some(_call) = self.driver.begin_end() else {
            return;
        };
        let _ = self.context.run(|| {
            // SAFETY: the memory was registered by us at this address.
            let status = unsafe { (self.driver.api().deregister_buffer)(pointer(self.address)) };
            check("cuFileBufDeregister", status)
        });
    }
}

/// The error of a call that comes while the process ends.
fn exiting(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, operation, "the process is ending")
}

/// Returns an address as cuFile takes it.
pub(super) fn pointer(address: u64) -> *mut std::ffi::c_void {
    usize::try_from(address).map_or(ptr::null_mut(), ptr::with_exposed_provenance_mut)
}
