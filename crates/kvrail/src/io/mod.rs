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

mod bounded;
mod cufile;
mod file;
mod folder;
mod handle;
mod observer;
mod permissions;
mod pieces;
mod posix;
mod probe;
mod small;

pub use bounded::within;
pub use cufile::CufileEngine;
pub use file::{IoFile, OpenMode};
pub use folder::{FileStatus, Folder, FolderRules, make_path};
pub use handle::{Completion, GivenUp, IoHandle};
pub use observer::{Observer, Step};
pub use permissions::Permissions;
pub use pieces::{PieceHandle, PieceRequest};
pub use posix::PosixEngine;
pub use probe::{MountReport, file_system_name, probe_folder, probe_mount};
pub(crate) use small::SmallMode;

use std::fmt;
use std::sync::Arc;

use crate::memory::{Arena, HostArena, StagingRange};

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

/// Moves bytes between staging memory and files.
pub trait IoEngine<A: Arena = HostArena>: fmt::Debug + Send + Sync {
    /// Returns the engine's name as users see it.
    fn name(&self) -> &'static str;

    /// Starts a request. Never blocks on I/O; a queue that is full completes it with an error.
    fn submit(&self, request: IoRequest<A>) -> IoHandle<A>;
}
