//! Streams, which order work on a device, and events, which mark points in them.
#![expect(unsafe_code, reason = "calls the CUDA driver")]

use std::ptr;
use std::time::{Duration, Instant};

use super::context::{Context, Priority};
use super::memory::DevicePointer;
use super::sys::{
    CopyAttributes, EVENT_DEFAULT, EVENT_UNTIMED, Handle, NOT_READY, ORDER_STREAM,
    STREAM_NON_BLOCKING,
};
use crate::error::{Error, ErrorKind, Result, check};

/// First sleep between two looks at an event, and the longest.
const POLL: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(500));

/// A stream: what is put on it runs in order.
#[derive(Debug)]
pub struct Stream {
    context: Context,
    handle: Handle,
    is_ours: bool,
}

// SAFETY: the driver allows calls for one stream from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: Context, priority: Priority) -> Result<Self> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the pointers are to live integers.
        context.call("cuCtxGetStreamPriorityRange", |api| unsafe {
            (api.priorities)(&raw mut least, &raw mut greatest)
        })?;
        let level = match priority {
            Priority::High => greatest,
            Priority::Low => least,
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        context.call("cuStreamCreateWithPriority", |api| unsafe {
            (api.stream_create)(&raw mut handle, STREAM_NON_BLOCKING, level)
        })?;
        Ok(Self {
            context,
            handle,
            is_ours: true,
        })
    }

    pub(super) fn external(context: Context, handle: usize) -> Self {
        Self {
            context,
            handle: ptr::with_exposed_provenance_mut(handle),
            is_ours: false,
        }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    /// Returns the `CUstream` as a number, as others take it.
    pub fn raw(&self) -> usize {
        self.handle.expose_provenance()
    }

    /// Returns whether this is the legacy default stream, which batches of copies do not take
    /// (`cuMemcpyBatchAsync` in the driver's documentation).
    pub fn is_legacy_default(&self) -> bool {
        // `CU_STREAM_LEGACY` is its other name.
        self.handle.addr() <= 1
    }

    /// Returns whether this and `other` are one stream, which waits for itself by its nature.
    pub fn is_same(&self, other: &Self) -> bool {
        self.handle == other.handle
    }

    /// Returns the context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Puts a copy from the device to the host on the stream.
    ///
    /// # Safety
    /// Both ranges stay valid, and nobody else touches them, until the stream is past the copy.
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn copy_to_host(
        &self,
        target: *mut u8,
        source: DevicePointer,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the ranges.
        self.context.call("cuMemcpyDtoHAsync", |api| unsafe {
            (api.to_host)(target.cast(), source, bytes, self.handle)
        })
    }

    /// Puts a copy from the host to the device on the stream.
    ///
    /// # Safety
    /// As [`Stream::copy_to_host`].
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn copy_to_device(
        &self,
        target: DevicePointer,
        source: *const u8,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the ranges.
        self.context.call("cuMemcpyHtoDAsync", |api| unsafe {
            (api.to_device)(target, source.cast(), bytes, self.handle)
        })
    }

    /// Puts a copy inside the device on the stream.
    ///
    /// # Safety
    /// As [`Stream::copy_to_host`].
    ///
    /// # Errors
    /// What the driver said.
    pub unsafe fn copy_on_device(
        &self,
        target: DevicePointer,
        source: DevicePointer,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the ranges.
        self.context.call("cuMemcpyDtoDAsync", |api| unsafe {
            (api.on_device)(target, source, bytes, self.handle)
        })
    }

    /// Puts many copies on the stream in one call. They may run in any order among themselves.
    ///
    /// # Safety
    /// As [`Stream::copy_to_host`], for each of them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the driver has no such call (before CUDA 12.8),
    /// [`ErrorKind::InvalidArgument`] for lists of different lengths, else what the driver said.
    pub unsafe fn copy_batch(
        &self,
        targets: &[DevicePointer],
        sources: &[DevicePointer],
        bytes: &[usize],
    ) -> Result<()> {
        const NAME: &str = "cuMemcpyBatchAsync";
        let count = targets.len();
        if sources.len() != count || bytes.len() != count {
            let message = "lists of different lengths";
            return Err(Error::new(ErrorKind::InvalidArgument, NAME, message));
        }
        if count == 0 {
            return Ok(());
        }
        let api = self.context.api();
        let mut attributes = CopyAttributes {
            order: ORDER_STREAM,
            source_hint: [0; 2],
            target_hint: [0; 2],
            flags: 0,
        };
        // One set of attributes, for all copies from the first on.
        let mut start = 0_usize;
        if let Some(batch) = api.batch_v2 {
            // SAFETY: the lists have `count` entries, the caller vouches for what they name.
            return self.context.call(NAME, |_| unsafe {
                batch(
                    targets.as_ptr(),
                    sources.as_ptr(),
                    bytes.as_ptr(),
                    count,
                    &raw mut attributes,
                    &raw mut start,
                    1,
                    self.handle,
                )
            });
        }
        let Some(batch) = api.batch else {
            let message = "the driver has none (CUDA 12.8 is the first with it)";
            return Err(Error::new(ErrorKind::Unsupported, NAME, message));
        };
        // The older form takes lists that it may write to.
        let (mut targets, mut sources, mut bytes) =
            (targets.to_vec(), sources.to_vec(), bytes.to_vec());
        let mut failed_at = 0;
        // SAFETY: as above.
        self.context.call(NAME, |_| unsafe {
            batch(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                bytes.as_mut_ptr(),
                count,
                &raw mut attributes,
                &raw mut start,
                1,
                &raw mut failed_at,
                self.handle,
            )
        })
    }

    /// Marks this point of the stream.
    ///
    /// # Errors
    /// What the driver said.
    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both handles are live.
        self.context.call("cuEventRecord", |api| unsafe {
            (api.event_record)(event.handle, self.handle)
        })
    }

    /// Makes what follows on the stream wait for an event.
    ///
    /// # Errors
    /// What the driver said.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: both handles are live; the flags must be zero.
        self.context.call("cuStreamWaitEvent", |api| unsafe {
            (api.stream_wait)(self.handle, event.handle, 0)
        })
    }

    /// Waits until all that was put on the stream is done, however long that takes.
    ///
    /// # Errors
    /// What the driver said, also about work before this call.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the handle is live.
        self.context.call("cuStreamSynchronize", |api| unsafe {
            (api.stream_synchronize)(self.handle)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_ours {
            // SAFETY: the stream is ours; the driver keeps it until its work is done.
            let _ = self.context.call("cuStreamDestroy", |api| unsafe {
                (api.stream_destroy)(self.handle)
            });
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Context,
    handle: Handle,
}

// SAFETY: the driver allows calls for one event from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: Context, timed: bool) -> Result<Self> {
        let flags = if timed { EVENT_DEFAULT } else { EVENT_UNTIMED };
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a live handle.
        context.call("cuEventCreate", |api| unsafe {
            (api.event_create)(&raw mut handle, flags)
        })?;
        Ok(Self { context, handle })
    }

    /// Returns whether the device has passed the point; also when it was never recorded.
    ///
    /// # Errors
    /// What the driver said, also about work before the point.
    pub fn is_done(&self) -> Result<bool> {
        self.context.run(|| {
            // SAFETY: the handle is live.
            match unsafe { (self.context.api().event_query)(self.handle) } {
                NOT_READY => Ok(false),
                code => check("cuEventQuery", code).map(|()| true),
            }
        })
    }

    /// Waits for the point until `deadline`; returns whether it was passed.
    ///
    /// # Errors
    /// As [`Event::is_done`].
    pub fn wait(&self, deadline: Instant) -> Result<bool> {
        let (mut pause, longest) = POLL;
        loop {
            if self.is_done()? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(longest);
        }
    }

    /// Returns the milliseconds of device time between `start` and this event.
    ///
    /// # Errors
    /// What the driver said; both events must be timed, have been recorded and be done.
    pub fn milliseconds_since(&self, start: &Self) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: the handles are live, the pointer is to a live number.
        self.context.call("cuEventElapsedTime", |api| unsafe {
            (api.event_elapsed)(&raw mut milliseconds, start.handle, self.handle)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is ours.
        let _ = self.context.call("cuEventDestroy", |api| unsafe {
            (api.event_destroy)(self.handle)
        });
    }
}
