//! Reads that take from the page cache what is there, in front of another engine.
//!
//! A chunk that somebody stored or read through the page cache lies in memory already, and a direct
//! read would fetch it from the device all the same. `cachestat(2)` tells without reading anything;
//! requests that are cached whole are read on a second descriptor of the same file, without waiting
//! (`preadv2` with `RWF_NOWAIT`), all others by the engine. That call alone would not do: the kernel
//! answers it for what is not cached by reading ahead, so that the device would read twice.
//!
//! Bytes of one file that come by both ways belong together: a file is written whole before it has
//! the name by which it is opened, nobody writes to it later, and Linux writes dirty pages out
//! before it reads the same range directly. What is read is verified like anything else.
//!
//! It costs one call of the system for a file of which nothing is cached.

use std::io::IoSliceMut;
use std::time::Instant;

use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::handle::Driven;
use super::{Folder, IoCounts, IoEngine, IoFile, IoHandle, IoRequest, Operation};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{HostArena, StagingPool, StagingRange};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An engine that looks into the page cache first, for files that it has [looked
/// at](CachedReads::look_at).
///
/// The thread that waits for a request copies what is cached, so that it finds the bytes in its own
/// CPU's cache afterwards.
#[derive(Debug)]
pub struct CachedReads {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engine: Arc<dyn IoEngine>,
    cache: Arc<Cache>,
}

/// What is known of the page cache, whichever engine is behind it.
#[derive(Debug, Default)]
struct Cache {
    /// Whether the kernel does not tell what is cached, or the file system knows no reads that do
    /// not wait. Neither ever learns.
    is_unsupported: AtomicBool,
    bytes: AtomicU64,
}

/// A read that is done when it is waited for.
#[derive(Debug)]
struct CachedRead {
    request: IoRequest,
    shared: Arc<Shared>,
}

impl CachedReads {
    /// Puts the page cache in front of `engine`.
    pub fn new(engine: Arc<dyn IoEngine>) -> Self {
        Self::over(engine, Arc::default())
    }

    /// Puts the page cache in front of another engine. What is known and counted stays.
    #[must_use]
    pub fn with_engine(&self, engine: Arc<dyn IoEngine>) -> Self {
        Self::over(engine, Arc::clone(&self.shared.cache))
    }

    fn over(engine: Arc<dyn IoEngine>, cache: Arc<Cache>) -> Self {
        Self {
            shared: Arc::new(Shared { engine, cache }),
        }
    }

    /// Gives a file that was opened direct a second view, through the page cache, if anything of it
    /// is there.
    #[must_use]
    pub fn look_at(&self, file: IoFile, folder: &Folder, below: &str) -> IoFile {
        let is_off = self.shared.cache.is_unsupported.load(Ordering::Relaxed);
        match !is_off && self.shared.cached_bytes(&file, 0, u64::MAX) > 0 {
            true => file.with_cached_view(folder, below),
            false => file,
        }
    }

    /// Returns the bytes that came from the page cache.
    pub fn bytes(&self) -> u64 {
        self.shared.cache.bytes.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// Remembers that something cannot be done here.
    fn note(&self, errno: Errno) {
        // What has no call or no such read now has none later. PERM is about a file of somebody else.
        if matches!(errno, Errno::NOSYS | Errno::OPNOTSUPP) {
            self.cache.is_unsupported.store(true, Ordering::Relaxed);
        }
    }

    /// Returns how many bytes of a range are cached, 0 where that cannot be told.
    fn cached_bytes(&self, file: &IoFile, offset: u64, bytes: u64) -> u64 {
        file.cached_bytes(offset, bytes).unwrap_or_else(|errno| {
            self.note(errno);
            0
        })
    }

    fn is_cached(&self, request: &IoRequest) -> bool {
        let bytes = request.buffer.len() as u64;
        request.operation == Operation::Read
            && request.file.cached_view().is_some()
            && self.cached_bytes(&request.file, request.offset, bytes) == bytes
    }

    /// Copies what is cached from the start of a request on, and returns whole pages of it: behind
    /// them the engine can go on.
    fn copy(&self, request: &mut IoRequest) -> usize {
        let Some(view) = request.file.cached_view() else {
            return 0;
        };
        let buffer = request.buffer.as_mut_slice();
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let offset = request.offset + done as u64;
            let mut parts = [IoSliceMut::new(rest)];
            match preadv2(view, &mut parts, offset, ReadWriteFlags::NOWAIT) {
                Ok(count) if count > 0 => done += count,
                Err(Errno::INTR) => {}
                // The file ends, or what was cached is so no more, or there is an error: the engine
                // meets it, too, and says so.
                Ok(_) => break,
                Err(errno) => {
                    self.note(errno);
                    break;
                }
            }
        }
        if done < buffer.len() {
            done = done / PAGE_BYTES * PAGE_BYTES;
        }
        self.cache.bytes.fetch_add(done as u64, Ordering::Relaxed);
        done
    }
}

impl Driven<HostArena> for CachedRead {
    fn wait(self: Box<Self>, deadline: Instant) -> Result<StagingRange> {
        let Self {
            mut request,
            shared,
        } = *self;
        let done = shared.copy(&mut request);
        if done == request.buffer.len() {
            return Ok(request.buffer);
        }
        let mut start = request.buffer.split_to(done);
        request.offset += done as u64;
        let rest = shared.engine.submit(request).wait(deadline)?;
        match start.is_empty() {
            true => Ok(rest),
            false => start.rejoin(rest).map(|()| start).map_err(|_| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    "I/O engine gave back another buffer",
                )
            }),
        }
    }
}

impl IoEngine for CachedReads {
    fn name(&self) -> &'static str {
        self.shared.engine.name()
    }

    fn submit(&self, request: IoRequest) -> IoHandle {
        let mut handles = self.submit_all(vec![request]);
        handles.pop().unwrap_or_else(|| IoHandle::pair().1)
    }

    /// Starts what is not cached at once, so that the device works while the rest is copied.
    fn submit_all(&self, requests: Vec<IoRequest>) -> Vec<IoHandle> {
        let shared = &self.shared;
        if !requests.iter().any(|one| one.file.cached_view().is_some()) {
            return shared.engine.submit_all(requests);
        }
        let mut rest = Vec::new();
        // In the order of the requests; `None` for one that goes to the engine.
        let mut handles: Vec<Option<IoHandle>> = Vec::with_capacity(requests.len());
        for request in requests {
            if !shared.is_cached(&request) {
                rest.push(request);
                handles.push(None);
                continue;
            }
            let read = CachedRead {
                request,
                shared: Arc::clone(shared),
            };
            handles.push(Some(IoHandle::driven(Box::new(read))));
        }
        // An engine may set something up for a batch, also for an empty one.
        let rest = match rest.is_empty() {
            true => Vec::new(),
            false => shared.engine.submit_all(rest),
        };
        let mut rest = rest.into_iter();
        let handles = handles.into_iter();
        handles
            .filter_map(|handle| handle.or_else(|| rest.next()))
            .collect()
    }

    fn request_bytes(&self, operation: Operation) -> usize {
        self.shared.engine.request_bytes(operation)
    }

    fn prepare(&self, pool: &StagingPool) -> Result<(), String> {
        self.shared.engine.prepare(pool)
    }

    fn counts(&self) -> IoCounts {
        IoCounts {
            from_page_cache: self.bytes(),
            ..self.shared.engine.counts()
        }
    }
}

#[cfg(test)]
mod tests;
