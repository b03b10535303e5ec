//! Settings: one typed struct, and the resolution of the sources a user can set it from.
//!
//! [`StoreConfig`] is what a store is opened with. [`resolve`] makes one from [`ConfigSources`]: the
//! connector's dictionary, the environment and a YAML file, with the names of LMCache. The library
//! never reads the environment or a file itself; the caller hands both in as data, so that a test
//! or a second store in the same process cannot be changed from outside.
//!
//! Precedence, highest first: `kv_connector_extra_config`, `KVRAIL_<KEY>`, `LMCACHE_<KEY>`, the YAML
//! file, the default. Every setting that is given is checked, also one that a higher source
//! overrides. Every error names the key, the value as given, where it was set, and what was
//! expected.
//!
//! ```
//! use kvrail::config::{ConfigSources, resolve};
//!
//! let sources = ConfigSources {
//!     environment: vec![("LMCACHE_GDS_PATH".into(), "/mnt/gds/cache".into())],
//!     file: Some(("gds-backend.yaml".into(), "chunk_size: 128".into())),
//!     ..ConfigSources::default()
//! };
//! let resolved = resolve(&sources)?;
//! assert_eq!(resolved.store.chunk_size, 128);
//! assert_eq!(resolved.origins["gds_path"], "LMCACHE_GDS_PATH");
//! # Ok::<(), kvrail::Error>(())
//! ```

mod choices;
mod file_mode;
mod foreign;
mod key;
mod lmcache;
mod resolve;
mod source;
mod store_config;
mod value;
mod yaml;

#[cfg(test)]
mod tests;

pub use choices::{
    Admission, ChunkHashing, DirectoryLayout, Durability, EngineChoice, EvictionPolicy, GdsBackend,
    LmcacheHash, LoadFailurePolicy, MinFree, PageCache, PathSharding, PathWeights,
};
pub use file_mode::FileMode;
pub use resolve::{ResolvedConfig, resolve};
pub use source::ConfigSources;
pub use store_config::StoreConfig;
pub use value::{age, size};
