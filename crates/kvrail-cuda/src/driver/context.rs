//! The primary context of a device.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

use std::ffi::{c_int, c_uint};
use std::ptr;
use std::sync::Arc;

use super::cuda::Cuda;
use super::memory::{DeviceMemory, PinnedRange};
use super::stream::{Event, Stream};
use super::sys::{Api, CAPTURE_RELAXED, Device, Handle};
use crate::error::{Result, check};

/// A hold on the primary context of a device. Clones share it; the last one gives it back.
///
/// Every method makes the context current on the calling thread and puts back what was, so each
/// works on any thread. It also works while another thread captures a graph: in the default mode
/// of capture the driver refuses to allocate and to query events on every thread of the process,
/// and a call that it refuses ends that capture, so meanwhile this thread is in the relaxed mode.
#[derive(Debug, Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cuda: Cuda,
    device: Device,
    ordinal: usize,
    handle: Handle,
}

// SAFETY: a context may be current on any number of threads.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Inner {}

/// What goes first where two streams have work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Before others.
    High,
    /// After others.
    Low,
}

impl Context {
    pub(super) fn retain(cuda: Cuda, device: Device, ordinal: usize) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        check("cuDevicePrimaryCtxRetain", unsafe {
            (cuda.api().retain)(&raw mut handle, device)
        })?;
        let inner = Inner {
            cuda,
            device,
            ordinal,
            handle,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Returns the number of the device.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }

    /// Returns the driver.
    pub fn cuda(&self) -> &Cuda {
        &self.inner.cuda
    }

    pub(crate) fn api(&self) -> &Api {
        self.inner.cuda.api()
    }

    /// Calls `work` with this context current on the calling thread.
    ///
    /// # Errors
    /// Those of `work`, or of the driver when it does not make the context current.
    pub fn run<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        // SAFETY: the handle is that of a context which this value holds.
        check("cuCtxPushCurrent", unsafe {
            (self.api().push)(self.inner.handle)
        })?;
        let mut current = Current {
            context: self,
            capture_mode: CAPTURE_RELAXED,
        };
        // SAFETY: the pointer is to a live integer, which then holds the mode that was.
        check("cuThreadExchangeStreamCaptureMode", unsafe {
            (self.api().exchange_capture_mode)(&raw mut current.capture_mode)
        })?;
        work()
    }

    /// Calls one function of the driver with this context current.
    pub(crate) fn call(&self, name: &'static str, call: impl FnOnce(&Api) -> c_int) -> Result<()> {
        self.run(|| check(name, call(self.api())))
    }

    /// Returns free and total memory of the device in bytes.
    ///
    /// # Errors
    /// What the driver said.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        self.call("cuMemGetInfo", |api| {
            // SAFETY: the pointers are to live integers.
            unsafe { (api.memory_info)(&raw mut free, &raw mut total) }
        })?;
        Ok((free, total))
    }

    /// Makes a stream that is not ordered with the default stream.
    ///
    /// # Errors
    /// What the driver said.
    pub fn stream(&self, priority: Priority) -> Result<Stream> {
        Stream::new(self.clone(), priority)
    }

    /// Takes a stream that somebody else made; 0 is the default stream. It is not destroyed here.
    ///
    /// # Safety
    /// `handle` is a live `CUstream` of this context as long as the value is used.
    pub unsafe fn external_stream(&self, handle: usize) -> Stream {
        Stream::external(self.clone(), handle)
    }

    /// Makes an event, for the order of things.
    ///
    /// # Errors
    /// What the driver said.
    pub fn event(&self) -> Result<Event> {
        Event::new(self.clone(), false)
    }

    /// Makes an event that knows when it was passed, which costs the device and the driver more.
    ///
    /// # Errors
    /// What the driver said.
    pub fn timed_event(&self) -> Result<Event> {
        Event::new(self.clone(), true)
    }

    /// Allocates device memory; it is not cleared.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`](crate::ErrorKind::OutOfMemory), else what the driver said.
    pub fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::new(self.clone(), bytes)
    }

    /// As [`Context::allocate`], beginning at a page of the GPU's memory: cuFile copies what does not.
    ///
    /// # Errors
    /// As [`Context::allocate`].
    pub fn allocate_at_page(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::at_page(self.clone(), bytes)
    }

    /// Pins host memory for all devices, until the value is dropped.
    ///
    /// # Safety
    /// The range stays mapped until then.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn pin(&self, address: usize, bytes: usize) -> Result<PinnedRange> {
        PinnedRange::new(self.clone(), address, bytes)
    }
}

/// The context as the current one of a thread.
struct Current<'a> {
    context: &'a Context,
    /// The thread's mode of capture before.
    capture_mode: c_uint,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let api = self.context.api();
        // SAFETY: as in `run`.
        let _ = unsafe { (api.exchange_capture_mode)(&raw mut self.capture_mode) };
        let mut popped = ptr::null_mut();
        // SAFETY: this thread pushed the context, and pops whatever it pushed later itself.
        let _ = unsafe { (api.pop)(&raw mut popped) };
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `retain` took the hold that is given back here, once.
        let _ = unsafe { (self.cuda.api().release)(self.device) };
    }
}
