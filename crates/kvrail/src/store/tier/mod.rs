//! The DRAM tier: images of chunks that stay in host memory, in front of the files.
//!
//! It is a process's own ([`own`]: staging buffers that are kept, nothing is copied to keep a chunk)
//! or that of all processes of a machine ([`segment`]: a file of a tmpfs that outlives them, to which
//! chunks are copied). An image is the chunk's file byte for byte, and is verified like one that was
//! read.

mod own;
mod segment;
mod segment_file;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::own::{Kept, OwnImage};
use self::segment::{SharedImage, Tag};
use self::segment_file::OpenSegment;
pub(super) use self::segment_file::check_folder;
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

/// The images that a store keeps; nothing without memory for it.
#[derive(Debug, Default)]
pub(super) struct Tier {
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
enum Memory {
    #[default]
    None,
    Own(Kept),
    Shared(Arc<Shared>),
}

/// A segment, and the namespace whose chunks it has for this store.
#[derive(Debug)]
struct Shared {
    opened: OpenSegment,
    namespace: String,
}

/// The image of a chunk file, held for a load.
#[derive(Debug)]
pub(super) enum Image {
    Own(Arc<OwnImage>),
    Shared(SharedImage),
}

impl Image {
    /// Returns whether its file is to be made young again, and takes that for done.
    pub(super) fn is_touch_due(&self) -> bool {
        match self {
            Self::Own(image) => image.is_touch_due(TOUCH_PAUSE),
            Self::Shared(image) => image.is_touch_due(TOUCH_PAUSE.as_secs()),
        }
    }
}

impl Tier {
    /// Lets the tier keep up to `slots_max` staging buffers of `slot_bytes`.
    pub(super) fn open_own(&self, slots_max: usize, slot_bytes: usize) {
        if slots_max > 0 {
            self.set(Memory::Own(Kept::new(slots_max, slot_bytes)));
        }
    }

    /// Lets the tier keep images of up to `slot_bytes` in up to `bytes` bytes that all processes
    /// share which name the same folder and namespace. Returns the bytes that there are.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] with the file's path.
    pub(super) fn open_shared(
        &self,
        folder: &Path,
        namespace: &str,
        slot_bytes: usize,
        bytes: usize,
    ) -> Result<usize> {
        let name = blake3::hash(namespace.as_bytes()).to_hex();
        let name = format!("{}-{slot_bytes}", name.get(..16).unwrap_or_default());
        let opened = segment_file::open(folder, &name, slot_bytes, bytes)?;
        let slots_total = opened.slots_total;
        self.set(Memory::Shared(Arc::new(Shared {
            opened,
            namespace: namespace.to_owned(),
        })));
        Ok(slots_total)
    }

    /// Keeps the image of a whole chunk, perhaps instead of others. Gives it back where it has to
    /// be copied ([`Tier::fill`]), which the caller does when nobody waits.
    pub(super) fn insert(
        &self,
        place: Place,
        bytes: Arc<StagingRange>,
    ) -> Option<Arc<StagingRange>> {
        match &mut *self.lock() {
            Memory::None => None,
            Memory::Own(kept) => {
                kept.insert(place, bytes);
                None
            }
            Memory::Shared(_) => Some(bytes),
        }
    }

    /// Copies the image of a whole chunk to where all processes have it.
    ///
    /// # Errors
    /// The system's: `StorageFull` where the tmpfs has no more memory.
    pub(super) fn fill(&self, place: &Place, bytes: &StagingRange) -> io::Result<()> {
        match self.shared() {
            None => Ok(()),
            Some(shared) => {
                let tag = Tag::new(&shared.namespace, place);
                shared.opened.segment.insert(tag, bytes.as_slice())
            }
        }
    }

    /// Returns the image of a chunk, if it is kept.
    pub(super) fn get(&self, place: &Place) -> Option<Image> {
        let shared = match &mut *self.lock() {
            Memory::None => return None,
            Memory::Own(kept) => return kept.get(place).map(Image::Own),
            Memory::Shared(shared) => Arc::clone(shared),
        };
        let tag = Tag::new(&shared.namespace, place);
        shared.opened.segment.get(tag).map(Image::Shared)
    }

    /// Lets an image go.
    pub(super) fn remove(&self, place: &Place) {
        if let Memory::Own(kept) = &mut *self.lock() {
            return kept.remove(place);
        }
        if let Some(shared) = self.shared() {
            let tag = Tag::new(&shared.namespace, place);
            shared.opened.segment.remove(tag);
        }
    }

    /// Returns the bytes of memory that images take: all of them, where processes share them.
    pub(super) fn bytes(&self) -> u64 {
        match &*self.lock() {
            Memory::None => 0,
            Memory::Own(kept) => kept.bytes(),
            Memory::Shared(shared) => shared.opened.segment.bytes(),
        }
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        match &*self.lock() {
            Memory::Shared(shared) => Some(Arc::clone(shared)),
            _ => None,
        }
    }

    fn set(&self, memory: Memory) {
        *self.lock() = memory;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
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
