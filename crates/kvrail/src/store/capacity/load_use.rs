//! The use of a chunk that was loaded: told to its files when nobody waits for the load any more.

use super::touch::{Use, told_until};
use crate::chunk::{ChunkRef, Part};
use crate::store::present::Place;
use crate::store::shared::StoreShared;
use crate::store::watch::Watched;

/// A load's use of its chunk.
#[derive(Debug)]
pub(in crate::store) struct LoadUse {
    /// What was asked for.
    pub(in crate::store) place: Place,
    pub(in crate::store) chunk: ChunkRef,
    /// Whose files it was loaded from.
    pub(in crate::store) parts: Vec<Part>,
}

impl LoadUse {
    /// Renews the stamps of the chunk and of those before it, as the job that `watched` knows. Returns
    /// whether some are left.
    pub(in crate::store) fn tell(&self, store: &StoreShared, watched: &Watched) -> bool {
        let until = told_until(store);
        let mut is_left = false;
        for part in &self.parts {
            let used = Use {
                store,
                group: self.place.0,
                part: *part,
                chunk: &self.chunk,
                watched,
                until,
            };
            is_left |= used.present();
        }
        is_left
    }
}
