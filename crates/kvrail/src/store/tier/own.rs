//! The tier of one process: staging buffers that it keeps.
//!
//! A staging buffer holds a chunk exactly as its file does. So nothing is copied: the tier keeps
//! buffers whose chunk was just written or read, and the pool is as much larger as the tier may
//! keep. Which chunks stay is left to a cache that one pass over many chunks does not empty.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::unsync::Cache;

use crate::memory::StagingRange;
use crate::store::present::Place;

/// The image of a chunk file, held by the tier and by the loads that read it.
#[derive(Debug)]
pub(in crate::store) struct OwnImage {
    pub(in crate::store) bytes: Arc<StagingRange>,
    touched: Mutex<Instant>,
}

impl OwnImage {
    /// Returns whether `pause` passed since the last touch of its file, and takes that for done.
    pub(super) fn is_touch_due(&self, pause: Duration) -> bool {
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = touched.elapsed() >= pause;
        if is_due {
            *touched = Instant::now();
        }
        is_due
    }
}

/// The buffers that are kept.
pub(super) struct Kept {
    images: Cache<Place, Arc<OwnImage>>,
    slots_max: usize,
    slot_bytes: usize,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Kept")
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Kept {
    /// Room for `slots_max` buffers of `slot_bytes`.
    pub(super) fn new(slots_max: usize, slot_bytes: usize) -> Self {
        Self {
            images: Cache::new(slots_max),
            slots_max,
            slot_bytes,
        }
    }

    /// Keeps the image of a whole chunk, perhaps instead of others.
    pub(super) fn insert(&mut self, place: Place, bytes: Arc<StagingRange>) {
        let image = OwnImage {
            bytes,
            touched: Mutex::new(Instant::now()),
        };
        self.images.insert(place, Arc::new(image));
        debug_assert!(self.images.len() <= self.slots_max);
    }

    /// Returns the image of a chunk, if it is kept.
    pub(super) fn get(&self, place: &Place) -> Option<Arc<OwnImage>> {
        self.images.get(place).cloned()
    }

    /// Lets an image go.
    pub(super) fn remove(&mut self, place: &Place) {
        self.images.remove(place);
    }

    /// Returns the bytes of all buffers that are kept.
    pub(super) fn bytes(&self) -> u64 {
        (self.images.len() * self.slot_bytes) as u64
    }
}
