//! Reading a store without KV cache: what tools list, verify, set aside and remove.
//!
//! Nothing here needs the store to be closed. Names on disk are read, checked, and written again
//! from what they mean: no path is made of a name that was found.

mod chunk;
mod lmcache_tree;
mod namespace;
mod quarantined;
mod removal;
mod scrub;
mod verify;

use std::path::Path;

pub use chunk::{ChunkFile, chunks, chunks_after, find_chunk};
pub use lmcache_tree::{LmcacheFile, lmcache_files};
pub use namespace::{NamespaceInfo, namespaces};
pub use quarantined::{Handled, QuarantinedChunk, quarantined, set_aside};
pub use removal::{Removed, empty_quarantine, remove_namespace};
pub use scrub::ScrubState;
pub use verify::{ChunkSummary, read_head, verify_chunk};

pub use super::bandwidth_record::recorded_bandwidth;
use super::directory::NamespaceDirectory;
pub use super::namespace::differences;
use crate::error::Result;
use crate::io::Folder;

/// Opens a namespace's directory, which is no symbolic link.
fn open_namespace(directory: &Path) -> Result<Folder> {
    NamespaceDirectory::at(directory)?.open()
}
