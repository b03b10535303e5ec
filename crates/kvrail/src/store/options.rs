//! How a store is opened.

use kvrail_cuda::LibraryPaths;

use crate::io::Observer;

/// What a store may do to its directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// Create directories and store chunks.
    #[default]
    ReadWrite,
    /// Look up and load only; nothing is created, written or set aside.
    ReadOnly,
}

/// Options of [`Store::open`](super::Store::open).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// What the store may do. Default: read and write.
    pub access: Access,
    /// CPUs for the store's threads. Default: those of the thread that opens it.
    ///
    /// For callers that pin the opening thread, as vLLM's CPU worker does: threads inherit that.
    pub cpus: Option<Vec<usize>>,
    /// Where the CUDA driver is looked for when a KV cache lies in the memory of a GPU. Default:
    /// the system's search.
    pub libraries: LibraryPaths,
    /// Who is told of each change to the directories; for tests. Default: nobody.
    pub observer: Option<Observer>,
}
