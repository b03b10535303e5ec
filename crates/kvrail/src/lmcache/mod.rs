//! The directory of LMCache 0.5.6's `GdsBackend`, as values: names and heads to bytes and back.
//!
//! `docs/format-lmcache.md` is the normative text. Nothing here opens a file, and nothing read from
//! disk is taken unless writing it again gives the same bytes.
//!
//! - [`Element`]: the types of elements, with the names that keys and heads have for them
//! - [`LmcacheKey`]: what a file name says
//! - [`FilePlace`]: where the file of a key lies
//! - [`TensorHead`]: the first 4 KiB of a file, and all of the metadata file beside it

mod element;
mod head;
mod key;
mod place;
mod quoting;

pub use element::Element;
pub use head::{HEAD_BYTES, MemoryFormat, TensorHead};
pub use key::{ChunkHash, LmcacheKey};
pub use place::{FileKind, FilePlace};
