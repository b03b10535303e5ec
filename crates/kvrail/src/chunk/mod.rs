//! What a chunk is on disk: its key, the lengths of its file, its head and its checksums.
//!
//! A chunk is the stored KV of `N` consecutive full blocks of one KV cache group on one rank. Its
//! file is a valid safetensors file of three parts, each a whole number of 4 KiB pages:
//!
//! ```text
//! head (4096 bytes) | payload, padded to pages | page table: XXH3-64 of each payload page
//! ```
//!
//! This module sees neither files nor memory regions; it turns values into bytes and back.
//! `docs/format.md` is the normative text.

mod checksum;
mod format;
mod head;
mod key;
mod part;

pub use checksum::{PageTable, RootHasher, first_bad_page, hash_pages, root_checksum};
pub use format::{ChunkFormat, FORMAT_VERSION, PAGE_BYTES};
pub use head::{ChunkHead, HeadFields};
pub use key::{ChunkKey, ChunkRef};
pub use part::{HeadRange, Part};
