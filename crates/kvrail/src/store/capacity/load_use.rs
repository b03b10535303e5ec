//! The use of a chunk that was loaded: told to its files when nobody waits for the load any more.

use std::sync::Arc;

use super::touch::Use;
use crate::chunk::{ChunkRef, Part};
use crate::store::cache_shared::CacheShared;
use crate::store::shared::StoreShared;
use crate::store::watch::Watched;

/// A load's use of its chunk.
#[derive(Debug)]
pub(in crate::store) struct LoadUse {
    pub(in crate::store) cache: Arc<CacheShared>,
    pub(in crate::store) chunk: ChunkRef,
    /// Whose files it was loaded from.
    pub(in crate::store) parts: Vec<Part>,
}

impl LoadUse {
    /// Renews the stamps of the chunk and of those before it, as the job that `watched` knows.
    pub(in crate::store) fn tell(&self, store: &StoreShared, watched: &Watched) {
        for part in &self.parts {
            let used = Use {
                store,
                cache: &self.cache,
                part: *part,
                chunk: &self.chunk,
                watched,
            };
            used.present();
        }
    }
}
