//! One GPU: its context, how it copies many pieces, and streams of our own.
#![expect(unsafe_code, reason = "takes streams that the serving engine made")]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvrail_cuda::{Context, Cuda, Event, Kernels, Priority, Stream};

use super::check::{check_copies, check_kernels};
use crate::error::{Error, Result};

/// Streams for each direction. Work of several chunks overlaps on them; more gain nothing, since
/// a GPU has one or two engines that copy over PCIe in each direction.
const STREAMS: usize = 4;

/// How many pieces are copied between KV cache and a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMethod {
    /// One launch of our own kernel that hashes the pages as it copies them.
    HashingKernel,
    /// One launch of our own kernel.
    Kernel,
    /// One `cuMemcpyBatchAsync`.
    Batch,
    /// One `cuMemcpyDtoDAsync` for each piece.
    Pieces,
}

impl CopyMethod {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::HashingKernel, Self::Kernel, Self::Batch, Self::Pieces];
}

impl fmt::Display for CopyMethod {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::HashingKernel => "hashing kernel",
            Self::Kernel => "kernel",
            Self::Batch => "batch copy",
            Self::Pieces => "copy per piece",
        })
    }
}

/// The stream on which the serving engine computes KV, as it names it.
///
/// The default is CUDA's legacy default stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ComputeStream(usize);

impl ComputeStream {
    /// Takes a `CUstream` as a number (PyTorch: `torch.cuda.current_stream().cuda_stream`).
    ///
    /// # Safety
    /// It is a live stream of the primary context of the device that holds the KV cache, as long
    /// as this value is used.
    pub unsafe fn from_raw(handle: usize) -> Self {
        Self(handle)
    }
}

/// One GPU in use, under its primary context: the one that PyTorch and vLLM use.
#[derive(Debug, Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
    /// A way of copying pieces other than the one that was chosen.
    forced: Option<CopyMethod>,
}

#[derive(Debug)]
struct Inner {
    kernels: Option<Kernels>,
    /// The ways to copy pieces that brought the right bytes, none of them timed; not empty.
    methods: Vec<CopyMethod>,
    reason: String,
    store_streams: Vec<Stream>,
    load_streams: Vec<Stream>,
    next: AtomicUsize,
    context: Context,
}

impl Gpu {
    /// Opens device `ordinal`: loads the kernels, and checks on the device that they and the driver's
    /// own copies do what they shall. What does not is not used.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu) when the driver gives no context, memory or
    /// stream, or when not even its own copies bring the bytes that were sent.
    pub fn open(cuda: &Cuda, ordinal: usize) -> Result<Self> {
        let failed = |error| Error::gpu(format!("cuda:{ordinal}"), error);
        let context = cuda.retain_primary(ordinal).map_err(failed)?;
        let streams = |priority| {
            (0..STREAMS)
                .map(|_| context.stream(priority).map_err(failed))
                .collect::<Result<Vec<_>>>()
        };
        let (store_streams, load_streams) = (streams(Priority::Low)?, streams(Priority::High)?);
        let kernels = Kernels::load(&context)
            .map_err(failed)
            .and_then(|kernels| check_kernels(&context, &kernels).map(|()| kernels));
        let (kernels, reason) = match kernels {
            Ok(kernels) => (Some(kernels), "kernels checked on the device".to_owned()),
            Err(error) => (None, format!("kernels not used ({error})")),
        };
        let mut methods = Vec::new();
        if kernels.is_some() {
            methods.extend([CopyMethod::HashingKernel, CopyMethod::Kernel]);
        }
        let mut failure = None;
        for method in [CopyMethod::Batch, CopyMethod::Pieces] {
            match check_copies(&context, method) {
                Ok(()) => methods.push(method),
                Err(error) => failure = Some(error),
            }
        }
        if let (true, Some(error)) = (methods.is_empty(), failure) {
            return Err(error);
        }
        let inner = Inner {
            kernels,
            methods,
            reason,
            store_streams,
            load_streams,
            next: AtomicUsize::new(0),
            context,
        };
        Ok(Self {
            inner: Arc::new(inner),
            forced: None,
        })
    }

    pub(super) fn forced(&self, method: CopyMethod) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            forced: Some(method),
        }
    }

    /// Returns the context.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// Returns the kernels, unless they do not work on this device.
    pub fn kernels(&self) -> Option<&Kernels> {
        self.inner.kernels.as_ref()
    }

    /// Returns how pieces are copied.
    pub fn method(&self) -> CopyMethod {
        let first = self.inner.methods.first().copied();
        self.forced.or(first).unwrap_or(CopyMethod::Pieces)
    }

    /// Returns how pieces are copied on a stream: the legacy default stream takes no batches.
    pub fn method_on(&self, stream: &Stream) -> CopyMethod {
        match (self.method(), self.kernels()) {
            (CopyMethod::Batch, Some(_)) if stream.is_legacy_default() => CopyMethod::Kernel,
            (CopyMethod::Batch, None) if stream.is_legacy_default() => CopyMethod::Pieces,
            (method, _) => method,
        }
    }

    /// Returns whether loads are verified and scattered in one pass.
    pub fn hashes_on_the_way(&self) -> bool {
        self.method() == CopyMethod::HashingKernel
    }

    /// Returns the ways of copying pieces that work on this device.
    pub fn methods(&self) -> &[CopyMethod] {
        &self.inner.methods
    }

    /// Returns why it is that way, in words.
    pub fn reason(&self) -> &str {
        &self.inner.reason
    }

    /// Returns the serving engine's stream.
    pub fn compute_stream(&self, stream: ComputeStream) -> Stream {
        // SAFETY: whoever made the value vouched for the handle.
        unsafe { self.context().external_stream(stream.0) }
    }

    /// Returns a stream for what follows a gather.
    pub fn store_stream(&self) -> &Stream {
        self.pick(&self.inner.store_streams)
    }

    /// Returns a stream for a load; loads go before stores on the device, too.
    pub fn load_stream(&self) -> &Stream {
        self.pick(&self.inner.load_streams)
    }

    /// Marks this point of a stream: the event is done when all before it is.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`](crate::ErrorKind::Gpu).
    pub fn mark(&self, stream: &Stream) -> Result<Event> {
        let failed = |error| Error::gpu("mark a stream", error);
        let event = self.context().event().map_err(failed)?;
        stream.record(&event).map_err(failed)?;
        Ok(event)
    }

    #[expect(clippy::indexing_slicing, reason = "never empty, the index is below")]
    fn pick<'a>(&self, streams: &'a [Stream]) -> &'a Stream {
        let next = self.inner.next.fetch_add(1, Ordering::Relaxed);
        &streams[next % streams.len()]
    }
}
