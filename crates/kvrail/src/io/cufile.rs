//! The `cufile` engine: files straight to and from the memory of a GPU, on threads of our own.
//!
//! Synchronous calls on a few threads rather than cuFile's batch or stream calls: those read their
//! arguments when the stream runs, report errors late, and hang on some file systems.
#![expect(
    unsafe_code,
    reason = "hands addresses of registered GPU memory to cuFile"
)]

use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use kvrail_cuda::{Context, CuFileDriver};

use super::{Completion, IoEngine, IoHandle, IoRequest, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{DeviceArena, StagingRange};

/// Calls of cuFile at the same time: some file systems hang from 256 on, and cuFile's own pools
/// have 64 buffers by default.
const THREADS_MAX: usize = 64;
/// Requests that may wait; the VRAM slots bound them far below this.
const QUEUE_REQUESTS_MAX: usize = 65_536;

type Queued = (IoRequest<DeviceArena>, Completion<DeviceArena>);

/// Moves bytes between files and registered memory of a GPU.
#[derive(Debug)]
pub struct CufileEngine {
    queue: Sender<Queued>,
}

impl CufileEngine {
    /// Starts `threads` threads (64 at most); `on_start` runs first on each of them.
    ///
    /// The threads end when the engine is dropped and the queue is empty.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the system gives no thread.
    pub fn new(
        driver: &CuFileDriver,
        context: &Context,
        threads: usize,
        on_start: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self> {
        let (queue, requests) = bounded(QUEUE_REQUESTS_MAX);
        for index in 0..threads.clamp(1, THREADS_MAX) {
            let requests: Receiver<Queued> = requests.clone();
            let (driver, context) = (driver.clone(), context.clone());
            let on_start = Arc::clone(on_start);
            thread::Builder::new()
                .name(format!("kvrail-cufile-{index}"))
                .spawn(move || {
                    on_start();
                    for (request, completion) in requests {
                        completion.complete(perform(&driver, &context, request));
                    }
                })
                .map_err(|source| {
                    Error::new(ErrorKind::Io, "start a cuFile thread").with_source(source)
                })?;
        }
        Ok(Self { queue })
    }
}

impl IoEngine<DeviceArena> for CufileEngine {
    fn name(&self) -> &'static str {
        "cufile"
    }

    fn submit(&self, request: IoRequest<DeviceArena>) -> IoHandle<DeviceArena> {
        let (completion, handle) = IoHandle::pair();
        match self.queue.try_send((request, completion)) {
            Ok(()) => {}
            Err(TrySendError::Full((_, completion))) => {
                completion.complete(Err(Error::new(ErrorKind::TimedOut, "cuFile queue is full")));
            }
            Err(TrySendError::Disconnected((_, completion))) => {
                let stopped = Error::new(ErrorKind::Closed, "cuFile engine stopped");
                completion.complete(Err(stopped));
            }
        }
        handle
    }
}

/// Performs one request whole: a short transfer is an error.
fn perform(
    driver: &CuFileDriver,
    context: &Context,
    request: IoRequest<DeviceArena>,
) -> Result<StagingRange<DeviceArena>> {
    let IoRequest {
        operation,
        file,
        offset,
        buffer,
    } = request;
    let handle = file.registered(driver)?;
    let (base, at, bytes) = (
        buffer.arena().address(),
        buffer.arena_offset(),
        buffer.len(),
    );
    let (name, moved) = match operation {
        Operation::Read => {
            // SAFETY: the range lies in the arena, which is registered and stays as long as
            // `buffer`; it is exclusive to this request.
            let read = context.run(|| unsafe { handle.read(base, bytes, offset, at) });
            ("cuFile read", read)
        }
        Operation::Write => {
            // SAFETY: as above; others may only read the range at the same time.
            let written = context.run(|| unsafe { handle.write(base, bytes, offset, at) });
            ("cuFile write", written)
        }
    };
    match moved {
        Ok(count) if count == bytes => Ok(buffer),
        Ok(count) => {
            let message = format!("{name} at {offset}: expected {bytes} bytes, got {count}");
            Err(Error::new(ErrorKind::Gpu, message).with_path(file.path()))
        }
        Err(error) => Err(Error::gpu(format!("{name} at {offset}"), error).with_path(file.path())),
    }
}
