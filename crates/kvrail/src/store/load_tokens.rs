//! One chunk from a file in LMCache's form into the KV cache.
//!
//! What was read is put into the form that chunks have in memory, and goes on from there like a chunk
//! of the DRAM tier. The file has no checksum: its length and its head are what is checked.

use std::sync::Arc;
use std::time::Instant;

use super::image;
use super::load_host::given_up;
use super::load_job::LoadJob;
use super::tier;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoEngine, IoFile, Operation};
use crate::memory::StagingRange;

/// Reads the whole file, checks its head, and copies the blocks that the job wants. Returns the
/// image of the whole chunk.
///
/// # Errors
/// [`ErrorKind::Damaged`] for another head than the KV cache's files have, [`ErrorKind::TimedOut`]
/// at the deadline or when the job was given up, which writes nothing to its blocks from then on;
/// those of reading.
pub(super) fn load(
    engine: &dyn IoEngine,
    job: &LoadJob,
    file: &Arc<IoFile>,
    mut buffer: StagingRange,
    deadline: Instant,
) -> Result<Arc<StagingRange>> {
    let cache = &*job.cache;
    let Some(form) = &cache.token_file else {
        let message = "a file in another form than the KV cache's";
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    };
    let mut rest = buffer.split_to(cache.format.file_bytes());
    let front = rest.split_to(form.file_bytes());
    let whole = 0..front.len();
    let whole = std::slice::from_ref(&whole);
    let parts = image::submit(engine, Operation::Read, file, whole, front);
    let parts = parts.into_iter().map(|part| part.wait(deadline)).collect();
    let mut image = image::rejoin(parts)?;
    image.rejoin(rest).map_err(|_| {
        Error::new(
            ErrorKind::InvalidArgument,
            "I/O engine gave back another buffer",
        )
    })?;
    form.give_image(cache, job.chunk, image.as_mut_slice())?;
    let image = Arc::new(image);
    if !job.watched.claim() {
        return Err(given_up());
    }
    let copied = match &cache.gpu {
        None => tier::copy_out(job, image.as_slice()),
        Some(gpu) => gpu.load_image(job, &image, deadline),
    };
    job.watched.release();
    copied.map(|()| image)
}
