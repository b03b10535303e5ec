//! kvrail keeps the KV cache of LLM serving in files and moves it between KV cache memory and
//! them, verified on every load.
//!
//! # Modules, from the bottom up
//! - [`chunk`]: what a chunk file is, as bytes
//! - [`layout`]: how a KV cache lies in memory, and the transfer plan of a chunk
//! - [`memory`]: regions of KV cache, staging buffers, gather and scatter
//! - [`io`]: I/O engines: how bytes move between staging buffers and files
//! - [`store`]: lookup, load and store of chunks in a shared directory
//! - [`lmcache`]: names and heads of LMCache's directories, as bytes
//! - [`config`]: the settings, resolved from sources that the caller read
//! - [`error`]: the one error type
//!
//! The library knows no Python, no terminal and no environment variables; it prints nothing.
//!
//! # Example
//! ```
//! # fn main() -> kvrail::Result<()> {
//! use std::time::Duration;
//! use kvrail::config::StoreConfig;
//! use kvrail::{ChunkKey, ChunkRef, KvLayout, LayerSpan, LoadChunk, Namespace, OpenOptions};
//! use kvrail::{Region, Store, StoreChunk};
//!
//! let directory = std::env::temp_dir().join(format!("kvrail-doc-{}", std::process::id()));
//! let config = StoreConfig::with_path(&directory);
//! let namespace = Namespace::new("my-model", serde_json::Map::new())?;
//! let store = Store::open(&config, namespace, OpenOptions::default())?;
//!
//! // Four blocks of two layers, 8 KiB each, layer outermost.
//! let memory = Region::zeroed(2 * 4 * 8192)?;
//! let layers = (0..2)
//!     .map(|l| LayerSpan { region: 0, offset: l * 4 * 8192, block_stride: 8192, block_bytes: 8192 })
//!     .collect();
//! let layout = KvLayout::new(layers, 4, &[memory.bytes()])?;
//! let kv_cache = store.attach(0, 0, layout, vec![memory], 2)?;
//!
//! let limit = Duration::from_secs(10);
//! let chunk = ChunkRef { key: ChunkKey::from_bytes(&[7; 32])?, parent: None };
//! kv_cache.store(&[StoreChunk { chunk, blocks: vec![0, 1] }])?.wait(limit)?;
//! assert_eq!(store.lookup(0, &[0], vec![chunk.key]).wait(limit)?, 1);
//! let load = kv_cache.load(vec![LoadChunk { chunk, first_block: 0, blocks: vec![2, 3] }])?;
//! assert_eq!(load.wait(limit)?.loaded, 1);
//! store.close(limit)?;
//! # std::fs::remove_dir_all(&directory).ok();
//! # Ok(())
//! # }
//! ```

pub mod chunk;
pub mod config;
pub mod error;
pub mod io;
pub mod layout;
pub mod lmcache;
pub mod memory;
pub mod store;
mod sync;

pub use chunk::{ChunkKey, ChunkRef, HeadRange, Part};
pub use error::{Error, ErrorKind, Result};
pub use layout::{KvLayout, LayerSpan};
pub use memory::{ComputeStream, Device, Region};
pub use store::{
    Access, KvCache, LoadChunk, LoadReport, LoadTicket, LookupTicket, Namespace, OpenOptions,
    PresenceTicket, Store, StoreChunk, StoreReport, StoreTicket,
};
