//! The `uring` engine: requests of one chunk side by side, in a ring of the thread that waits.
//!
//! A batch of requests takes a ring for as long as it lasts. The caller's own thread submits it,
//! with one call of the system, and takes the completions while it waits, so nothing passes from
//! thread to thread. A request whose caller has gone stays in its ring, with its memory, until the
//! kernel is through; the ring is drained by somebody else meanwhile.
//!
//! Not used: a polling thread of the kernel (it burns a core), polled completions (they take a
//! driver made for them), registered files (a file lives for few requests, so registering it costs
//! more calls than it saves).

mod batch;
mod counts;
mod registration;
mod ring;
mod rings;

use std::fmt;
use std::sync::Arc;

use self::batch::{Batch, Part};
use self::registration::Registration;
use self::ring::Ring;
use self::rings::Rings;
use super::{IoCounts, IoEngine, IoHandle, IoRequest, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::StagingPool;

/// Bytes of one request, in either direction: a chunk has several of them in flight.
const REQUEST_BYTES: usize = 4 << 20;

/// Moves bytes through io_uring.
pub struct UringEngine {
    rings: Arc<Rings>,
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("UringEngine").field(&self.rings).finish()
    }
}

impl UringEngine {
    /// Makes an engine for `threads` threads that use it at a time.
    ///
    /// `on_start` runs first on each thread of the engine's own; there is one only while the kernel
    /// has requests whose callers are gone.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] with the reason in words where io_uring cannot be used: a kernel, a
    /// container or a setting that forbids it.
    pub fn new(threads: usize, on_start: Arc<dyn Fn() + Send + Sync>) -> Result<Self> {
        let rings = Arc::new(Rings::new(threads, on_start)?);
        Ok(Self { rings })
    }

    /// Registers the memory of `pool` with the engine's rings, and returns how many have it.
    ///
    /// # Errors
    /// As of [`IoEngine::prepare`].
    pub fn register(&self, pool: &StagingPool) -> Result<usize, String> {
        register(&self.rings, pool)
    }
}

impl IoEngine for UringEngine {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        let mut handles = self.submit_all(vec![request]);
        handles.pop().unwrap_or_else(|| IoHandle::pair().1)
    }

    fn submit_all(&self, requests: Vec<IoRequest>) -> Vec<IoHandle> {
        match self.rings.take() {
            Ok(ring) => Batch::start(&self.rings, ring, requests)
                .into_iter()
                .map(|part: Part| IoHandle::driven(Box::new(part)))
                .collect(),
            Err(error) => requests.iter().map(|_| refused(&error)).collect(),
        }
    }

    fn request_bytes(&self, _operation: Operation) -> usize {
        REQUEST_BYTES
    }

    /// Registers the memory, so that the kernel need not look its pages up for each request.
    fn prepare(&self, pool: &StagingPool) -> Result<(), String> {
        self.register(pool).map(drop)
    }

    fn counts(&self) -> IoCounts {
        self.rings.counts()
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        self.rings.close();
    }
}

/// Completes a request for which there is no ring.
fn refused(error: &Error) -> IoHandle {
    let (completion, handle) = IoHandle::pair();
    let again = Error::new(error.kind(), error.to_string());
    completion.complete(Err(match error.kind() {
        // As the file system's own time-out, for whoever judges paths.
        ErrorKind::TimedOut => {
            again.with_source(std::io::Error::from(std::io::ErrorKind::TimedOut))
        }
        _ => again,
    }));
    handle
}

fn register(rings: &Arc<Rings>, pool: &StagingPool) -> Result<usize, String> {
    let registration = Registration::of(pool.arena());
    let mut taken: Vec<Ring> = Vec::new();
    let mut outcome = Ok(());
    while taken.len() < rings.ready_max() && outcome.is_ok() {
        let Ok(mut ring) = rings.take() else {
            break;
        };
        if ring.registration() != Some(&registration) {
            // The pages are counted and looked up once, where the kernel can copy a registration.
            let source = taken.first().map(Ring::source);
            outcome = ring.register(registration, source);
        }
        taken.push(ring);
    }
    let has = |ring: &&Ring| ring.registration() == Some(&registration);
    let count = taken.iter().filter(has).count();
    taken.into_iter().for_each(|ring| rings.give_back(ring));
    outcome.map(|()| count).map_err(|error| {
        let mebibytes = registration.bytes().div_ceil(1 << 20);
        let reason = refusal(&error);
        format!(
            "uring goes on without registered buffers ({mebibytes} MiB of staging memory): {reason}"
        )
    })
}

/// Says what it means that the system gives no ring, or does not register memory.
fn refusal(error: &std::io::Error) -> String {
    use rustix::io::Errno;
    let meaning = match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "forbidden, by kernel.io_uring_disabled or by the container's seccomp filter"
        }
        Some(Errno::NOSYS) => "this kernel has no io_uring, or a seccomp filter hides it",
        Some(Errno::NOMEM) => {
            "the limit on locked memory is too low (ulimit -l, docker --ulimit memlock=-1)"
        }
        Some(Errno::MFILE | Errno::NFILE) => "too many files are open",
        None if error.kind() == std::io::ErrorKind::Unsupported => {
            "this kernel's io_uring is too old, it takes Linux 5.11"
        }
        _ => return error.to_string(),
    };
    format!("{meaning} ({error})")
}

#[cfg(test)]
mod tests;
