//! A chunk from its file into KV cache in host memory: one pass over its bytes.
//!
//! The page table lies at the file's end and is asked for first, so that each part is verified and
//! copied as it comes, window by window, while the rest is on its way. What the device wrote to
//! staging memory is read from there once: the copy finds it in the CPU's cache.

use std::sync::Arc;
use std::time::Instant;

use super::image::{self, Extents, Part};
use super::load_job::LoadJob;
use super::verify::{verify_frame, verify_into};
use crate::chunk::{PAGE_BYTES, PageTable};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoEngine, IoFile, Operation};
use crate::layout::TransferPlan;
use crate::memory::{Scatter, StagingRange};

/// What was read: head, pages, page table, one behind the other.
pub(super) struct Loaded {
    pub(super) image: StagingRange,
    pub(super) extents: Extents,
}

/// Reads what the job wants, verifies it and copies it to its blocks. A page is copied when it is
/// known to be good: the blocks of a chunk that fails may hold some of its good pages.
///
/// # Errors
/// [`ErrorKind::Damaged`] for what is not as it was stored, [`ErrorKind::TimedOut`] at the deadline
/// or when the job was given up, which writes nothing to its blocks from then on; those of reading.
pub(super) fn load(
    engine: &dyn IoEngine,
    job: &LoadJob,
    file: &Arc<IoFile>,
    buffer: StagingRange,
    deadline: Instant,
) -> Result<Loaded> {
    let extents = Extents::new(&job.cache.format, &job.payload);
    let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
    let (table, parts) = submit(engine, job, file, &extents, buffer);
    let table = match table {
        Some(parts) => {
            let parts = parts.into_iter().map(|part| part.wait(deadline));
            Some(image::rejoin(parts.collect())?)
        }
        None => None,
    };
    let mut arrivals = Arrivals {
        job,
        extents: &extents,
        table: table.as_ref(),
        entries: None,
        scatter: Scatter::new(&plan, &job.cache.regions),
    };
    let mut read = Vec::with_capacity(parts.len() + 1);
    for part in parts {
        let offset = part.offset;
        let bytes = part.wait(deadline)?;
        if !job.watched.claim() {
            return Err(given_up());
        }
        let taken = arrivals.take(offset, bytes.as_slice());
        job.watched.release();
        taken?;
        read.push(Ok(bytes));
    }
    if !arrivals.scatter.is_complete() {
        return Err(incomplete());
    }
    read.extend(table.map(Ok));
    let image = image::rejoin(read)?;
    Ok(Loaded { image, extents })
}

/// Submits all requests: for the page table alone, and for the rest in the order of the file. What
/// fits into one request is one, the page table in it.
fn submit(
    engine: &dyn IoEngine,
    job: &LoadJob,
    file: &Arc<IoFile>,
    extents: &Extents,
    mut buffer: StagingRange,
) -> (Option<Vec<Part>>, Vec<Part>) {
    let format = &job.cache.format;
    let mut ranges = extents.ranges.clone();
    let submit = |ranges: &[_], image| image::submit(engine, Operation::Read, file, ranges, image);
    if let [range] = ranges.as_slice()
        && range.len() <= engine.request_bytes(Operation::Read)
    {
        return (None, submit(&ranges, buffer));
    }
    let table = format.table_offset()..format.file_bytes();
    if let Some(last) = ranges.last_mut() {
        last.end = table.start;
    }
    let rest = ranges.iter().map(|range| range.len()).sum();
    let image = buffer.split_to(rest);
    let table = submit(std::slice::from_ref(&table), buffer);
    (Some(table), submit(&ranges, image))
}

/// What has come of a chunk so far.
struct Arrivals<'a> {
    job: &'a LoadJob,
    extents: &'a Extents,
    /// The page table as it was read, unless it comes with the first part.
    table: Option<&'a StagingRange>,
    /// The same, once it and the head were found good.
    entries: Option<PageTable>,
    scatter: Scatter<'a>,
}

impl Arrivals<'_> {
    /// Takes the next part of the file, which begins at `offset`.
    fn take(&mut self, offset: usize, content: &[u8]) -> Result<()> {
        let format = &self.job.cache.format;
        let entries = match self.entries.take() {
            Some(entries) => entries,
            None => {
                let head = image::bytes_of(content, 0..PAGE_BYTES)?;
                let table = match self.table {
                    Some(table) => table.as_slice(),
                    None => {
                        let start = content.len().saturating_sub(format.table_bytes());
                        image::bytes_of(content, start..content.len())?
                    }
                };
                verify_frame(self.job, head, table)?
            }
        };
        let pages = &self.extents.pages;
        let start = format.payload_offset() + pages.start * PAGE_BYTES;
        let from = start.saturating_sub(offset);
        let first = pages.start + offset.saturating_sub(start) / PAGE_BYTES;
        let bytes = pages.end.saturating_sub(first) * PAGE_BYTES;
        let to = content.len().min(from.saturating_add(bytes));
        if from < to {
            let content = image::bytes_of(content, from..to)?;
            verify_into(self.job, &entries, first, content, &mut self.scatter)?;
        }
        self.entries = Some(entries);
        Ok(())
    }
}

pub(super) fn given_up() -> Error {
    Error::new(ErrorKind::TimedOut, "the load was given up")
}

fn incomplete() -> Error {
    let message = "fewer bytes were read than its blocks have";
    Error::new(ErrorKind::InvalidArgument, message)
}
