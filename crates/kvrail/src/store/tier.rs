//! The DRAM tier: images of chunks that stay in host memory, in front of the files.
//!
//! A staging buffer holds a chunk exactly as its file does. So the tier copies nothing: it keeps
//! buffers whose chunk was just written or read, and the pool is as much larger as the tier may
//! keep. Which chunks stay is left to a cache that one pass over many chunks does not empty.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quick_cache::unsync::Cache;

use super::image;
use super::load_job::LoadJob;
use super::present::Place;
use super::verify::{verify_frame, verify_into};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;
use crate::memory::{Scatter, StagingRange};

/// How often a use of a chunk in memory makes its file young. Stamps change once in a minute at
/// most, and asking for one is a system call.
const TOUCH_PAUSE: Duration = Duration::from_secs(60);

/// The image of a chunk file, held by the tier and by the loads that read it.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) bytes: Arc<StagingRange>,
    touched: Mutex<Instant>,
}

impl Image {
    /// Returns whether its file is to be made young again, and takes that for done.
    pub(super) fn is_touch_due(&self) -> bool {
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = touched.elapsed() >= TOUCH_PAUSE;
        if is_due {
            *touched = Instant::now();
        }
        is_due
    }
}

/// The images that a store keeps; nothing without memory for it.
#[derive(Default)]
pub(super) struct Tier {
    kept: Mutex<Option<Kept>>,
}

struct Kept {
    images: Cache<Place, Arc<Image>>,
    slots_max: usize,
    slot_bytes: usize,
}

impl std::fmt::Debug for Tier {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Tier")
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Tier {
    /// Lets the tier keep up to `slots_max` buffers of `slot_bytes`.
    pub(super) fn open(&self, slots_max: usize, slot_bytes: usize) {
        let kept = (slots_max > 0).then(|| Kept {
            images: Cache::new(slots_max),
            slots_max,
            slot_bytes,
        });
        *self.lock() = kept;
    }

    /// Keeps the image of a whole chunk, perhaps instead of others.
    pub(super) fn insert(&self, place: Place, bytes: Arc<StagingRange>) {
        let mut guard = self.lock();
        let Some(kept) = guard.as_mut() else { return };
        let image = Image {
            bytes,
            touched: Mutex::new(Instant::now()),
        };
        kept.images.insert(place, Arc::new(image));
        debug_assert!(kept.images.len() <= kept.slots_max);
    }

    /// Returns the image of a chunk, if it is kept.
    pub(super) fn get(&self, place: &Place) -> Option<Arc<Image>> {
        let guard = self.lock();
        guard.as_ref()?.images.get(place).cloned()
    }

    /// Lets an image go.
    pub(super) fn remove(&self, place: &Place) {
        if let Some(kept) = self.lock().as_mut() {
            kept.images.remove(place);
        }
    }

    /// Returns the bytes of all buffers that are kept.
    pub(super) fn bytes(&self) -> u64 {
        let guard = self.lock();
        let kept = guard.as_ref();
        kept.map_or(0, |kept| (kept.images.len() * kept.slot_bytes) as u64)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings a chunk from its image to the job's blocks in host memory: verified like one that was
/// read, in one pass. Memory can go bad, too.
///
/// # Errors
/// [`ErrorKind::Damaged`] when the image is not what was stored.
pub(super) fn copy_out(job: &LoadJob, image: &[u8]) -> Result<()> {
    let format = &job.cache.format;
    let head = image::bytes_of(image, 0..format.payload_offset())?;
    let table = image::bytes_of(image, format.table_offset()..format.file_bytes())?;
    let table = verify_frame(job, head, table)?;
    let first_page = job.payload.start / PAGE_BYTES;
    let start = format.payload_offset() + first_page * PAGE_BYTES;
    let pages = image::bytes_of(image, start..format.table_offset())?;
    let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
    let mut scatter = Scatter::new(&plan, &job.cache.regions);
    verify_into(job, &table, first_page, pages, &mut scatter)?;
    if scatter.is_complete() {
        return Ok(());
    }
    let message = "an image with fewer bytes than its blocks";
    Err(Error::new(ErrorKind::InvalidArgument, message))
}
