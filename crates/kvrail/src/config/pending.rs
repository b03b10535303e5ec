//! The keys that are understood but have no effect in this version.
//!
//! Such a key is no error, because the same file works with LMCache and with later versions; it is
//! no silence either, because a user who asked for a limit must know that there is none. A version
//! that implements one drops its row.

use super::store_config::StoreConfig;

/// One key without effect.
pub(super) struct Pending {
    /// The key's full name.
    pub(super) key: &'static str,
    /// Whether the configuration asks for what is missing.
    pub(super) asks: fn(&StoreConfig) -> bool,
    /// What happens instead.
    pub(super) instead: &'static str,
}

/// Every such key.
pub(super) static PENDING: &[Pending] = &[Pending {
    key: "local_cpu",
    asks: |config| config.local_cpu,
    instead: "this version has no DRAM tier, every hit is read from the files",
}];
