//! I/O engines: how bytes move between staging memory and files.
//!
//! An engine takes a request that owns its memory and gives a handle. The memory belongs to the
//! engine's side until the request is done and comes back through the handle; dropping a handle
//! frees nothing in flight. A request is done whole or fails: a short read or write is an error.
//!
//! Engines see files and offsets, never chunk keys.
//!
//! A [`Folder`] is an open directory: what the store touches is reached relative to one, and no
//! symbolic link is followed on the way.

mod bandwidth;
mod bounded;
mod cached_reads;
mod cachestat;
mod close;
mod compare;
mod cufile;
mod file;
mod folder;
mod handle;
mod observer;
mod permissions;
mod pieces;
mod posix;
mod probe;
mod progress;
mod registered_file;
mod small;
mod trial;
mod uring;

pub use bandwidth::{Bandwidth, measure_bandwidth};
pub use bounded::within;
pub use cached_reads::CachedReads;
pub(crate) use close::close;
pub use compare::{Comparison, compare_engines};
pub use cufile::CufileEngine;
pub use file::{IoFile, OpenMode};
pub use folder::{FileStatus, Folder, FolderRules, make_path};
pub use handle::{Completion, GivenUp, IoHandle};
pub use observer::{Observer, Step};
pub use permissions::Permissions;
pub use pieces::{Cancelled, PieceHandle, PieceRequest};
pub use posix::PosixEngine;
pub use probe::{MountReport, file_system_name, probe_folder, probe_mount};
pub(crate) use small::SmallMode;
pub use uring::UringEngine;

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::memory::{Arena, HostArena, StagingPool, StagingRange};

/// The direction of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// One contiguous transfer between a file and a buffer; it owns both until it is done.
#[derive(Debug)]
pub struct IoRequest<A: Arena = HostArena> {
    /// The direction.
    pub operation: Operation,
    /// The file; a multiple of the page size in offset and length where it is opened direct.
    pub file: Arc<IoFile>,
    /// Bytes from the file's start.
    pub offset: u64,
    /// The memory; its whole length is transferred.
    pub buffer: StagingRange<A>,
}

/// Bytes of one read request: small enough that hashing the first one starts while the others are
/// read, large enough that a request costs little (see `docs/benchmarks.md`).
const READ_REQUEST_BYTES: usize = 4 << 20;
/// Bytes of one write request. File systems extend a file under a lock, so parts of one file do
/// not gain from being written side by side.
const WRITE_REQUEST_BYTES: usize = 16 << 20;

/// Moves bytes between staging memory and files.
pub trait IoEngine<A: Arena = HostArena>: fmt::Debug + Send + Sync {
    /// Returns the engine's name as users see it.
    fn name(&self) -> &'static str;

    /// Starts a request. Never blocks on I/O; a queue that is full completes it with an error.
    fn submit(&self, request: IoRequest<A>) -> IoHandle<A>;

    /// Starts requests that belong together, such as the parts of a chunk, and returns their
    /// handles in the same order. They are for one thread: it may be what drives them all.
    fn submit_all(&self, requests: Vec<IoRequest<A>>) -> Vec<IoHandle<A>> {
        let requests = requests.into_iter();
        requests.map(|request| self.submit(request)).collect()
    }

    /// Returns the bytes of a request that the engine does best with: a range that is longer
    /// should be given to it in parts.
    fn request_bytes(&self, operation: Operation) -> usize {
        match operation {
            Operation::Read => READ_REQUEST_BYTES,
            Operation::Write => WRITE_REQUEST_BYTES,
        }
    }

    /// Tells the engine of the memory that requests will come from, and gives it the time to make
    /// something of that: up to as long as it takes to provide every page.
    ///
    /// # Errors
    /// What the engine has to do without, in words; it works all the same.
    fn prepare(&self, pool: &StagingPool<A>) -> Result<(), String> {
        let _ = pool;
        Ok(())
    }

    /// Returns what the engine has counted, if it counts.
    fn counts(&self) -> IoCounts {
        IoCounts::default()
    }
}

/// What an engine counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct IoCounts {
    /// Transfers that were asked to go on, because the system had moved a part only.
    pub continued: u64,
    /// Transfers that the file system could not do without waiting, so that a thread of the kernel
    /// did them.
    pub handed_over: u64,
    /// Requests that nobody waited for any more, and that the kernel was asked to end.
    pub cancelled: u64,
    /// Requests whose memory was left to the kernel for good.
    pub leaked: u64,
    /// Requests that nobody waits for and that the kernel still has, now.
    pub held: u64,
    /// Bytes that reads took from the page cache.
    pub from_page_cache: u64,
}
