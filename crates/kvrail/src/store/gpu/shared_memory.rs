//! What the KV caches of a store on one GPU have together: VRAM slots, and what cuFile knows of them.
//!
//! A model has several KV cache groups, each attached on its own. The settings speak of one
//! staging memory, and vLLM lets the groups share their tensors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvrail_cuda::{Context, CuFileDriver};

use crate::error::Result;
use crate::memory::{GpuSlots, Region, RegisteredRegion, SlotShape, WeakGpuSlots};

/// What slots are for; those of one use are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Whole chunks on their way to pinned memory.
    Pinned,
    /// Whole chunks that cuFile moves.
    Cufile,
    /// Whole chunks that cuFile does not move after all, beside a KV cache that it has in place.
    Fallback,
}

/// The memory of a GPU that several KV caches use.
#[derive(Debug, Default)]
pub(in crate::store) struct SharedMemory {
    slots: Mutex<Vec<(Use, WeakGpuSlots)>>,
    /// Locked while cuFile registers, which may hang.
    regions: Mutex<Vec<Weak<RegisteredRegion>>>,
}

impl SharedMemory {
    /// Returns slots of this use that are there, if they are large enough.
    pub(super) fn slots(&self, wanted: Use, shape: SlotShape) -> Option<GpuSlots> {
        let known = lock(&self.slots);
        let mut found = known.iter().filter(|(kind, _)| *kind == wanted);
        found.find_map(|(_, slots)| slots.with_shape(shape))
    }

    /// Has others find slots, as long as somebody uses them.
    pub(super) fn share_slots(&self, kind: Use, slots: &GpuSlots) {
        let mut known = lock(&self.slots);
        known.retain(|(_, slots)| !slots.are_gone());
        known.push((kind, slots.downgrade()));
    }

    /// Registers a region of KV cache with cuFile, unless it is already: cuFile refuses that.
    ///
    /// # Errors
    /// As [`RegisteredRegion::new`].
    pub(super) fn register(
        &self,
        region: Region,
        driver: &CuFileDriver,
        context: &Context,
    ) -> Result<Arc<RegisteredRegion>> {
        let address = region.device_span(0, region.bytes())?;
        let mut known = lock(&self.regions);
        known.retain(|region| region.strong_count() > 0);
        let mut regions = known.iter().filter_map(Weak::upgrade);
        let same = |known: &Arc<RegisteredRegion>| {
            known.address() == address && known.bytes() == region.bytes()
        };
        if let Some(found) = regions.find(same) {
            return Ok(found);
        }
        let registered = Arc::new(RegisteredRegion::new(region, driver, context)?);
        known.push(Arc::downgrade(&registered));
        Ok(registered)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
