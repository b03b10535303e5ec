//! The `cufile` engine: files straight to and from the memory of a GPU, on threads of our own.
//!
//! Synchronous calls on a few threads rather than cuFile's batch or stream calls: those read their
//! arguments when the stream runs, report errors late, and hang on some file systems.
//!
//! Small requests go before large ones, and have a thread of their own beside: head and page table
//! of a chunk that is read in place would wait for tens of milliseconds behind what others read.
//!
//! Two kinds of requests: a range of the staging slots, as every engine takes it, and pieces of KV
//! cache in place ([`PieceRequest`]), for the direct path.
#![expect(
    unsafe_code,
    reason = "hands addresses of registered GPU memory to cuFile"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select_biased};
use kvrail_cuda::{Context, CuFileDriver, FileHandle, TRANSFER_BYTES_MAX};

use super::pieces::{PieceCompletion, PieceHandle, PieceRequest};
use super::{Completion, IoEngine, IoHandle, IoRequest, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{DeviceArena, StagingRange};

/// Calls of cuFile at the same time: some file systems hang from 256 on, and cuFile's own pools
/// have 64 buffers by default.
const THREADS_MAX: usize = 64;
/// Bytes of a request that counts as small: a page table of 512 MiB of payload, and far below what a
/// disk moves while a thread takes its next request.
const SMALL_BYTES: usize = 1 << 20;
/// Requests that may wait; the VRAM slots bound them far below this.
const QUEUE_REQUESTS_MAX: usize = 65_536;
/// Pieces of one vectored call (`IOV_MAX` of Linux).
const PIECES_MAX: usize = 1024;

/// What waits for a thread.
#[derive(Debug)]
enum Queued {
    Range(IoRequest<DeviceArena>, Completion<DeviceArena>),
    Pieces(PieceRequest, PieceCompletion),
}

/// How long the end of an engine waits for its threads: as good as nothing unless a call hangs.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Moves bytes between files and registered memory of a GPU.
///
/// Dropping it waits a second for its threads, so that they have let go of cuFile before the
/// process ends: libcufile frees its memory then, whoever still uses it.
#[derive(Debug)]
pub struct CufileEngine {
    /// `None` when the engine ends.
    queues: Option<Queues>,
    /// Disconnected when all threads have ended.
    ended: Receiver<()>,
}

/// The two ends that requests go in at.
#[derive(Debug)]
struct Queues {
    small: Sender<Queued>,
    large: Sender<Queued>,
}

/// What a thread works with.
#[derive(Debug, Clone)]
struct Worker {
    driver: CuFileDriver,
    context: Context,
    /// Whether one call takes many pieces; cleared when the library refuses it after all.
    vectored: Arc<AtomicBool>,
}

impl CufileEngine {
    /// Starts `threads` threads (63 at most), and one for small requests alone; `on_start` runs first
    /// on each of them.
    ///
    /// The threads end when the engine is dropped and the queues are empty.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the system gives no thread.
    pub fn new(
        driver: &CuFileDriver,
        context: &Context,
        threads: usize,
        on_start: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self> {
        let (small, small_requests) = bounded(QUEUE_REQUESTS_MAX);
        let (large, large_requests) = bounded(QUEUE_REQUESTS_MAX);
        let (alive, ended) = bounded::<()>(0);
        let worker = Worker {
            driver: driver.clone(),
            context: context.clone(),
            vectored: Arc::new(AtomicBool::new(driver.has_vectored())),
        };
        for index in 0..=threads.clamp(1, THREADS_MAX - 1) {
            let small: Receiver<Queued> = small_requests.clone();
            // The first one knows of no large ones.
            let large: Option<Receiver<Queued>> = (index > 0).then(|| large_requests.clone());
            let (worker, alive) = (worker.clone(), alive.clone());
            let on_start = Arc::clone(on_start);
            thread::Builder::new()
                .name(format!("kvrail-cufile-{index}"))
                .spawn(move || {
                    on_start();
                    while let Some(queued) = next(&small, large.as_ref()) {
                        match queued {
                            Queued::Range(request, completion) => {
                                completion.complete(worker.perform(request));
                            }
                            Queued::Pieces(request, completion) => {
                                let result = worker.perform_pieces(&request, &completion);
                                // Whoever waits may rename the file, and free the memory.
                                drop(request);
                                completion.complete(result);
                            }
                        }
                    }
                    drop(worker);
                    drop(alive);
                })
                .map_err(|source| {
                    Error::new(ErrorKind::Io, "start a cuFile thread").with_source(source)
                })?;
        }
        Ok(Self {
            queues: Some(Queues { small, large }),
            ended,
        })
    }

    /// Starts a transfer between a file and pieces of registered memory, in place.
    ///
    /// The caller rules who touches the pieces meanwhile: nobody for a read, nobody who writes for
    /// a write. Dropping the handle changes nothing about that: the transfer goes on.
    pub fn submit_pieces(&self, request: PieceRequest) -> PieceHandle {
        let (completion, handle) = PieceHandle::pair();
        let bytes = request.pieces.iter().map(std::ops::Range::len).sum();
        self.send(bytes, Queued::Pieces(request, completion));
        handle
    }

    fn send(&self, bytes: usize, queued: Queued) {
        let sent = match &self.queues {
            Some(queues) if bytes <= SMALL_BYTES => queues.small.try_send(queued),
            Some(queues) => queues.large.try_send(queued),
            None => Err(TrySendError::Disconnected(queued)),
        };
        if let Err(error) = sent {
            refuse(error);
        }
    }
}

impl Drop for CufileEngine {
    fn drop(&mut self) {
        self.queues = None;
        let _ = self.ended.recv_timeout(END_LIMIT);
    }
}

impl IoEngine<DeviceArena> for CufileEngine {
    fn name(&self) -> &'static str {
        "cufile"
    }

    fn submit(&self, request: IoRequest<DeviceArena>) -> IoHandle<DeviceArena> {
        let (completion, handle) = IoHandle::pair();
        self.send(request.buffer.len(), Queued::Range(request, completion));
        handle
    }
}

/// Waits for a request, a small one if there is one; `None` when the engine has ended and all are
/// taken.
fn next(small: &Receiver<Queued>, large: Option<&Receiver<Queued>>) -> Option<Queued> {
    let Some(large) = large else {
        return small.recv().ok();
    };
    let queued = select_biased! {
        recv(small) -> queued => queued.or_else(|_| large.recv()),
        recv(large) -> queued => queued.or_else(|_| small.recv()),
    };
    queued.ok()
}

/// Completes a request that the queue did not take.
fn refuse(error: TrySendError<Queued>) {
    let (queued, error) = match error {
        TrySendError::Full(queued) => {
            let full = Error::new(ErrorKind::TimedOut, "cuFile queue is full");
            (queued, full)
        }
        TrySendError::Disconnected(queued) => {
            let stopped = Error::new(ErrorKind::Closed, "cuFile engine stopped");
            (queued, stopped)
        }
    };
    match queued {
        Queued::Range(_, completion) => completion.complete(Err(error)),
        Queued::Pieces(_, completion) => completion.complete(Err(error)),
    }
}

impl Worker {
    /// Performs one request whole: a short transfer is an error.
    fn perform(&self, request: IoRequest<DeviceArena>) -> Result<StagingRange<DeviceArena>> {
        let IoRequest {
            operation,
            file,
            offset,
            buffer,
        } = request;
        let handle = file.registered(&self.driver)?;
        let (base, at) = (buffer.arena().address(), buffer.arena_offset());
        self.move_range(handle, operation, base, at, buffer.len(), offset)
            .map_err(|error| error.with_path(file.path()))?;
        Ok(buffer)
    }

    /// Performs a request for pieces whole, in calls of 16 MiB at most.
    fn perform_pieces(&self, request: &PieceRequest, completion: &PieceCompletion) -> Result<()> {
        let cancelled = || Error::new(ErrorKind::Closed, "the transfer was cancelled");
        if !completion.take() {
            return Err(cancelled());
        }
        let handle = request.file.registered(&self.driver)?;
        if !completion.begin() {
            return Err(cancelled());
        }
        let moved = if self.vectored.load(Ordering::Relaxed) {
            match self.move_vectored(handle, request) {
                Err(error) if is_unsupported(&error) => {
                    self.vectored.store(false, Ordering::Relaxed);
                    self.move_one_by_one(handle, request)
                }
                result => result,
            }
        } else {
            self.move_one_by_one(handle, request)
        };
        moved.map_err(|error| error.with_path(request.file.path()))
    }

    /// One call for as many pieces as it takes.
    fn move_vectored(&self, handle: &FileHandle, request: &PieceRequest) -> Result<()> {
        let base = request.memory.address();
        let mut offset = request.offset;
        let mut rest = request.pieces.as_slice();
        while let Some(first) = rest.first() {
            let mut bytes = first.len();
            let mut count = 1;
            for piece in rest.iter().skip(1) {
                if count == PIECES_MAX || bytes + piece.len() > TRANSFER_BYTES_MAX {
                    break;
                }
                bytes += piece.len();
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            let list: Vec<(u64, usize)> = now
                .iter()
                .map(|piece| (base + piece.start as u64, piece.len()))
                .collect();
            let moved = self.context.run(|| match request.operation {
                // SAFETY: the pieces lie in registered memory that the request holds; the caller
                // of `submit_pieces` sees to it that nobody else touches them.
                Operation::Read => unsafe { handle.read_vectored(&list, offset) },
                // SAFETY: as above; others may only read.
                Operation::Write => unsafe { handle.write_vectored(&list, offset) },
            });
            check(request.operation, offset, bytes, moved)?;
            offset += bytes as u64;
            rest = later;
        }
        Ok(())
    }

    /// A call for each piece.
    fn move_one_by_one(&self, handle: &FileHandle, request: &PieceRequest) -> Result<()> {
        let base = request.memory.address();
        let mut offset = request.offset;
        for piece in &request.pieces {
            let mut at = piece.start;
            while at < piece.end {
                let bytes = (piece.end - at).min(TRANSFER_BYTES_MAX);
                self.move_range(handle, request.operation, base, at, bytes, offset)?;
                at += bytes;
                offset += bytes as u64;
            }
        }
        Ok(())
    }

    /// One call for one range of registered memory, which the caller holds.
    fn move_range(
        &self,
        handle: &FileHandle,
        operation: Operation,
        base: u64,
        at: usize,
        bytes: usize,
        offset: u64,
    ) -> Result<()> {
        let moved = self.context.run(|| match operation {
            // SAFETY: the range lies in registered memory that the request holds, and is the
            // request's alone.
            Operation::Read => unsafe { handle.read(base, bytes, offset, at) },
            // SAFETY: as above; others may read the range at the same time.
            Operation::Write => unsafe { handle.write(base, bytes, offset, at) },
        });
        check(operation, offset, bytes, moved)
    }
}

/// Turns what a call moved into a result: anything but all of it is an error.
fn check(
    operation: Operation,
    offset: u64,
    bytes: usize,
    moved: kvrail_cuda::Result<usize>,
) -> Result<()> {
    let name = match operation {
        Operation::Read => "cuFile read",
        Operation::Write => "cuFile write",
    };
    match moved {
        Ok(count) if count == bytes => Ok(()),
        Ok(count) => {
            let message = format!("{name} at {offset}: expected {bytes} bytes, got {count}");
            Err(Error::new(ErrorKind::Gpu, message))
        }
        Err(error) => Err(Error::gpu(format!("{name} at {offset}"), error)),
    }
}

/// Returns whether the library has the call but does not do it.
fn is_unsupported(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    let cuda = source.and_then(|source| source.downcast_ref::<kvrail_cuda::Error>());
    cuda.is_some_and(|error| error.kind() == kvrail_cuda::ErrorKind::Unsupported)
}
