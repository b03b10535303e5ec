//! How a store is opened.

use kvrail_cuda::LibraryPaths;
use kvrail_cuda::probe::ProbeProgram;
use kvrail_cuda::system::SystemView;

use super::lmcache_names::LmcacheNames;
use crate::io::Observer;
use crate::memory::CopyMethod;

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
    /// Whether nothing is said at start of how the namespace differs from the nearest other one: one
    /// of the processes that open the same says it for all. Default: it is said.
    pub quiet: bool,
    /// CPUs for the store's threads. Default: those of the thread that opens it.
    ///
    /// For callers that pin the opening thread, as vLLM's CPU worker does: threads inherit that.
    pub cpus: Option<Vec<usize>>,
    /// Where the CUDA driver and cuFile are looked for when a KV cache lies in the memory of a GPU.
    /// Default: the system's search.
    pub libraries: LibraryPaths,
    /// How a GPU copies the pieces of a chunk, for tests and comparisons. Default: what is the quickest
    /// for a KV cache when it is attached.
    pub copy_method: Option<CopyMethod>,
    /// A program that calls [`kvrail_cuda::probe::answer`]: it tries cuFile before this process
    /// does. Default: none, and then cuFile is not used.
    pub cufile_probe: Option<ProbeProgram>,
    /// Where it is looked whether cuFile may be tried. Default: this machine.
    pub system: SystemView,
    /// Why cuFile must not read and write KV cache in place: its memory may be taken away while the
    /// store has it. Default: it may, where it can.
    pub no_in_place: Option<String>,
    /// What the files of LMCache's directory are named by, with
    /// [`DirectoryLayout::Lmcache`](crate::config::DirectoryLayout::Lmcache) and only then.
    pub lmcache: Option<LmcacheNames>,
    /// Who is told of each change to the directories; for tests. Default: nobody.
    pub observer: Option<Observer>,
}
