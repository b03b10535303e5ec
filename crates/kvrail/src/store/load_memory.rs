//! A chunk from the DRAM tier into the KV cache.

use std::sync::Arc;
use std::time::Instant;

use super::gpu::Route;
use super::load_host::given_up;
use super::load_job::{LoadBuffer, LoadJob};
use super::notice::Topic;
use super::shared::StoreShared;
use super::tier::{self, Image};
use crate::error::{ErrorKind, Result};
use crate::memory::StagingRange;

/// Loads one chunk that the DRAM tier has. `None` when it has not, or what it has went bad.
///
/// Takes the load's `buffer` where the bytes have to pass it.
///
/// # Errors
/// [`ErrorKind::TimedOut`] when the job was given up; those of a GPU.
pub(super) fn load(
    store: &StoreShared,
    job: &LoadJob,
    buffer: &mut Option<LoadBuffer>,
    deadline: Instant,
) -> Option<Result<()>> {
    if job.route != Route::Posix {
        return None;
    }
    let place = job.cache.place(&job.chunk.key);
    let image = store.tier.get(&place)?;
    let file_bytes = job.cache.format.file_bytes();
    // A GPU copies from memory that is pinned for it.
    let pinned = match (&job.cache.gpu, &image) {
        (Some(_), Image::Shared(image)) => {
            Some(Arc::new(pin(job, buffer, image.bytes(file_bytes))?))
        }
        _ => None,
    };
    if !job.watched.claim() {
        return Some(Err(given_up()));
    }
    let loaded = match (&job.cache.gpu, &image, &pinned) {
        (None, Image::Own(image), _) => tier::copy_out(job, image.bytes.as_slice()),
        (None, Image::Shared(image), _) => tier::copy_out(job, image.bytes(file_bytes)),
        (Some(gpu), Image::Own(image), _) => gpu.load_image(job, &image.bytes, deadline),
        (Some(gpu), Image::Shared(_), Some(image)) => gpu.load_image(job, image, deadline),
        (Some(_), Image::Shared(_), None) => Err(given_up()),
    };
    job.watched.release();
    match loaded {
        Ok(()) => {
            store.metrics.local_cpu_chunks_loaded.add(1);
            let bytes = job.payload.len() as u64;
            store.metrics.local_cpu_bytes_loaded.add(bytes);
            if image.is_touch_due() {
                job.note_use(job.cache.part);
            }
            Some(Ok(()))
        }
        Err(error) if error.kind() == ErrorKind::Damaged => {
            // Not held any more, so that it can go.
            drop(image);
            store.tier.remove(&place);
            store.metrics.chunks_damaged.add(1);
            store.notices.warn(Topic::ChunkDamaged, || {
                format!("bad chunk in host memory, read from its file: {error}")
            });
            None
        }
        Err(error) => Some(Err(error)),
    }
}

/// Copies an image to the load's staging buffer; `None` when it has none and none is free.
fn pin(job: &LoadJob, buffer: &mut Option<LoadBuffer>, image: &[u8]) -> Option<StagingRange> {
    let taken = match buffer.take() {
        Some(buffer) => buffer,
        None => job.try_take_buffer()?,
    };
    let LoadBuffer::Host(mut whole) = taken else {
        return None;
    };
    let mut pinned = whole.split_to(image.len());
    pinned.as_mut_slice().copy_from_slice(image);
    Some(pinned)
}
