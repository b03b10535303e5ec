//! The `posix` engine: a pool of threads with pread and pwrite.

use std::fmt;

use super::progress::{Progress, Step};
use super::{Completion, GivenUp, IoEngine, IoFile, IoHandle, IoRequest, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::StagingRange;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::channel::{Receiver, Sender, TrySendError, bounded};
use crate::sync::thread;
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests that may wait. The staging pool bounds them far below this: a request owns a part of
/// a slot, and a slot is split into few parts.
const QUEUE_REQUESTS_MAX: usize = 65_536;

/// Threads for each that was asked for, when all others are lost to requests that never end.
const REPLACEMENTS_MAX: usize = 3;

/// Moves bytes with plain system calls on its own threads; works on every file system.
///
/// A thread whose request goes on although its caller has gone counts as lost and is replaced, a
/// bounded number of times, so that one mount that hangs does not keep the others waiting. It takes
/// no further request when it comes back.
pub struct PosixEngine {
    queue: Sender<(IoRequest, Completion)>,
    requests: Receiver<(IoRequest, Completion)>,
    threads: Mutex<Threads>,
    on_start: Arc<dyn Fn() + Send + Sync>,
    threads_max: usize,
}

/// The threads that are there, each with what it does.
#[derive(Debug, Default)]
struct Threads {
    seats: Vec<Arc<Seat>>,
    started: usize,
}

/// One thread's place.
#[derive(Debug, Default)]
struct Seat {
    /// Whether the caller of the request under way has gone.
    request: Mutex<Option<GivenUp>>,
    /// Set when another thread does its work from now on.
    is_replaced: AtomicBool,
    has_ended: AtomicBool,
}

impl Seat {
    fn request(&self) -> MutexGuard<'_, Option<GivenUp>> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_lost(&self) -> bool {
        self.request().as_ref().is_some_and(GivenUp::get)
    }
}

impl fmt::Debug for PosixEngine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("PosixEngine")
            .field("waiting", &self.queue.len())
            .finish_non_exhaustive()
    }
}

impl PosixEngine {
    /// Starts `threads` threads; `on_start` runs first on each of them.
    ///
    /// The threads end when the engine is dropped and the queue is empty. Nothing waits for them.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the system gives no thread.
    pub fn new(threads: usize, on_start: Arc<dyn Fn() + Send + Sync>) -> Result<Self> {
        let (queue, requests) = bounded(QUEUE_REQUESTS_MAX);
        let count = threads.max(1);
        let engine = Self {
            queue,
            requests,
            threads: Mutex::default(),
            on_start,
            threads_max: count * (1 + REPLACEMENTS_MAX),
        };
        let mut threads = engine.threads();
        for _ in 0..count {
            engine.start(&mut threads).map_err(|source| {
                Error::new(ErrorKind::Io, "start an I/O thread").with_source(source)
            })?;
        }
        drop(threads);
        Ok(engine)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one more thread.
    fn start(&self, threads: &mut Threads) -> std::io::Result<()> {
        let seat = Arc::new(Seat::default());
        let (requests, on_start) = (self.requests.clone(), Arc::clone(&self.on_start));
        let theirs = Arc::clone(&seat);
        thread::Builder::new()
            .name(format!("kvrail-io-{}", threads.started))
            .spawn(move || {
                on_start();
                serve(&requests, &theirs);
            })?;
        threads.started += 1;
        threads.seats.push(seat);
        Ok(())
    }

    /// Replaces the threads that are lost, as long as there may be more.
    fn replace_lost(&self) {
        // Somebody else is at it already.
        let Ok(mut threads) = self.threads.try_lock() else {
            return;
        };
        threads
            .seats
            .retain(|seat| !seat.has_ended.load(Ordering::Acquire));
        let lost: Vec<Arc<Seat>> = threads
            .seats
            .iter()
            .filter(|seat| seat.is_lost() && !seat.is_replaced.load(Ordering::Acquire))
            .cloned()
            .collect();
        for seat in lost {
            // Without a thread from the system the old one serves again when it comes back.
            if threads.seats.len() < self.threads_max && self.start(&mut threads).is_ok() {
                seat.is_replaced.store(true, Ordering::Release);
            }
        }
    }
}

/// What a thread does: requests, until it is replaced or there are none any more.
fn serve(requests: &Receiver<(IoRequest, Completion)>, seat: &Seat) {
    for (request, completion) in requests {
        let given_up = completion.given_up();
        if given_up.get() && request.operation == Operation::Read {
            // Nobody wants it any more; its memory goes back.
            continue;
        }
        *seat.request() = Some(given_up);
        let result = perform(request);
        *seat.request() = None;
        completion.complete(result);
        if seat.is_replaced.load(Ordering::Acquire) {
            break;
        }
    }
    seat.has_ended.store(true, Ordering::Release);
}

impl IoEngine for PosixEngine {
    fn name(&self) -> &'static str {
        "posix"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        let (completion, handle) = IoHandle::pair();
        self.replace_lost();
        match self.queue.try_send((request, completion)) {
            Ok(()) => {}
            Err(TrySendError::Full((_, completion))) => {
                completion.complete(Err(Error::new(ErrorKind::TimedOut, "I/O queue is full")));
            }
            Err(TrySendError::Disconnected((_, completion))) => {
                completion.complete(Err(Error::new(ErrorKind::Closed, "I/O engine stopped")));
            }
        }
        handle
    }
}

/// Performs one request whole.
fn perform(mut request: IoRequest) -> Result<StagingRange> {
    let IoRequest {
        operation,
        file,
        offset,
        buffer,
    } = &mut request;
    match operation {
        Operation::Read => read_whole(file, *offset, buffer.as_mut_slice())?,
        Operation::Write => write_whole(file, *offset, buffer.as_slice())?,
    }
    Ok(request.buffer)
}

/// Reads until the buffer is full; the end of the file before that means a damaged file.
pub(super) fn read_whole(file: &IoFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
    let mut progress = Progress::new(Operation::Read, offset, buffer.len());
    while let Some(rest) = buffer
        .get_mut(progress.done()..)
        .filter(|rest| !rest.is_empty())
    {
        let moved = rustix::io::pread(file, rest, progress.rest_offset());
        if let Step::Failed(error) = progress.advance(moved, file) {
            return Err(error);
        }
    }
    Ok(())
}

/// Writes until the buffer is empty.
pub(super) fn write_whole(file: &IoFile, offset: u64, buffer: &[u8]) -> Result<()> {
    let mut progress = Progress::new(Operation::Write, offset, buffer.len());
    while let Some(rest) = buffer
        .get(progress.done()..)
        .filter(|rest| !rest.is_empty())
    {
        let moved = rustix::io::pwrite(file, rest, progress.rest_offset());
        if let Step::Failed(error) = progress.advance(moved, file) {
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::OpenMode;
    use super::*;
    use crate::memory::StagingPool;

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn request(
        operation: Operation,
        file: &Arc<IoFile>,
        offset: u64,
        buffer: StagingRange,
    ) -> IoRequest {
        IoRequest {
            operation,
            file: Arc::clone(file),
            offset,
            buffer,
        }
    }

    #[test]
    fn parts_written_by_several_threads_read_back_as_one() {
        let directory = tempfile::tempdir().unwrap();
        let engine = PosixEngine::new(3, Arc::new(|| ())).unwrap();
        let pool = StagingPool::new(2 << 16, 1 << 16).unwrap();
        let path = directory.path().join("file");
        let file = Arc::new(IoFile::open(&path, OpenMode::CreateNew, false).unwrap());
        let mut source = pool.take(deadline()).unwrap();
        source
            .as_mut_slice()
            .iter_mut()
            .enumerate()
            .for_each(|(i, b)| *b = (i * 13 % 255) as u8);
        let expected = source.as_slice().to_vec();
        let handles: Vec<IoHandle> = (0..16)
            .map(|part| {
                let buffer = source.split_to(4096);
                engine.submit(request(Operation::Write, &file, part * 4096, buffer))
            })
            .collect();
        for handle in handles {
            handle.wait(deadline()).unwrap();
        }
        let target = pool.take(deadline()).unwrap();
        let handle = engine.submit(request(Operation::Read, &file, 0, target));
        assert_eq!(handle.wait(deadline()).unwrap().as_slice(), expected);
    }

    #[test]
    fn a_short_read_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let engine = PosixEngine::new(1, Arc::new(|| ())).unwrap();
        let pool = StagingPool::new(8192, 8192).unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, [1; 5000]).unwrap();
        let file = Arc::new(IoFile::open(&path, OpenMode::Read, false).unwrap());
        let buffer = pool.take(deadline()).unwrap();
        let handle = engine.submit(request(Operation::Read, &file, 0, buffer));
        let error = handle.wait(deadline()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(
            error.to_string().contains("expected 8192 bytes, got 5000"),
            "{error}"
        );
        assert_eq!(pool.free_count(), 1, "the buffer is back");
    }

    #[test]
    fn a_dropped_handle_leaves_the_buffer_to_the_engine() {
        let directory = tempfile::tempdir().unwrap();
        let engine = PosixEngine::new(2, Arc::new(|| ())).unwrap();
        let pool = StagingPool::new(4 << 20, 1 << 20).unwrap();
        for index in 0..40 {
            let path = directory.path().join(index.to_string());
            let file = Arc::new(IoFile::open(&path, OpenMode::CreateNew, false).unwrap());
            let buffer = pool.take(deadline()).unwrap();
            drop(engine.submit(request(Operation::Write, &file, 0, buffer)));
        }
        let end = deadline();
        while pool.free_count() < pool.slot_count() {
            assert!(Instant::now() < end, "a buffer was lost");
            thread::yield_now();
        }
        for index in 0..40 {
            let length = std::fs::metadata(directory.path().join(index.to_string()))
                .unwrap()
                .len();
            assert_eq!(length, 1 << 20);
        }
    }

    #[test]
    fn reads_that_nobody_waits_for_are_not_done() {
        let (completion, handle) = IoHandle::<crate::memory::HostArena>::pair();
        let given_up = completion.given_up();
        assert!(!given_up.get());
        assert_eq!(
            handle.wait(Instant::now()).unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        assert!(given_up.get());
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        std::fs::write(&target, "x").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(IoFile::open(&link, OpenMode::Read, false).is_err());
    }
}
