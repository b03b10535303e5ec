//! Chunks that this process knows to be present, so that it does not gather them again.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use crate::chunk::{ChunkKey, Part};
use crate::sync::{Mutex, PoisonError};

/// How long knowledge holds. Others may remove chunks, and until then they are not stored again;
/// gathering a chunk once in this time for nothing costs little.
const HOLDS: Duration = Duration::from_secs(30);
/// Chunks remembered: about 6 MB.
const CHUNKS_MAX: usize = 65_536;

/// A chunk's place: group, part, key.
pub(super) type Place = (u32, Part, ChunkKey);

/// The chunks that were stored, loaded or are being stored by this process lately.
#[derive(Debug, Default)]
pub(super) struct PresentChunks {
    known: Mutex<HashMap<Place, Instant>>,
}

impl PresentChunks {
    /// Notes a chunk. Returns whether it was new: known chunks need no store.
    pub(super) fn insert(&self, place: Place) -> bool {
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CHUNKS_MAX {
            known.retain(|_, since| now.duration_since(*since) < HOLDS);
            if known.len() >= CHUNKS_MAX {
                // Forgetting costs a gather and a stat for each chunk that comes again.
                known.clear();
            }
        }
        match known.entry(place) {
            Entry::Occupied(mut entry) if now.duration_since(*entry.get()) >= HOLDS => {
                entry.insert(now);
                true
            }
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(now);
                true
            }
        }
    }

    /// Forgets a chunk that turned out not to be there.
    pub(super) fn remove(&self, place: &Place) {
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_not_new_and_the_number_is_bounded() {
        let present = PresentChunks::default();
        let place = |index: u64| {
            (
                0,
                0.into(),
                ChunkKey::from_bytes(&index.to_le_bytes()).unwrap(),
            )
        };
        assert!(present.insert(place(1)));
        assert!(!present.insert(place(1)));
        present.remove(&place(1));
        assert!(present.insert(place(1)));
        (0..2 * CHUNKS_MAX as u64).for_each(|index| {
            present.insert(place(index));
        });
        assert!(present.known.lock().unwrap().len() <= CHUNKS_MAX);
    }
}
