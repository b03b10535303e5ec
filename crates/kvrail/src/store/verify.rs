//! Whether what was read of a chunk file is what was stored.

use std::ops::Range;

use super::image;
use super::load_job::LoadJob;
use crate::chunk::{
    ChunkFormat, ChunkHead, HeadFields, PAGE_BYTES, PageTable, first_bad_page, hash_pages,
    root_checksum,
};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Scatter;

/// Hashes the payload pages of a part that starts at `offset` of the file.
pub(super) fn hash_part(bytes: &[u8], offset: usize, pages_start: usize, computed: &mut [u64]) {
    let skipped = pages_start.saturating_sub(offset);
    let first = offset.saturating_sub(pages_start) / PAGE_BYTES;
    if let (Some(pages), Some(hashes)) = (bytes.get(skipped..), computed.get_mut(first..)) {
        hash_pages(pages, hashes);
    }
}

/// Checks head and page table of a chunk against each other and against the job; returns the
/// table.
pub(super) fn verify_frame(job: &LoadJob, head: &[u8], table: &[u8]) -> Result<PageTable> {
    let fields = job.cache.head_fields(job.chunk);
    verify_frame_of(&fields, &job.cache.format, head, table)
}

/// As [`verify_frame`], of a file with any fields and format.
pub(super) fn verify_frame_of(
    fields: &HeadFields,
    format: &ChunkFormat,
    head: &[u8],
    table: &[u8],
) -> Result<PageTable> {
    let damaged = |message: &str| Err(Error::new(ErrorKind::Damaged, message));
    let root = ChunkHead::check(head, fields, format)?;
    if root_checksum(table) != root {
        return damaged("page table does not match the root checksum");
    }
    match PageTable::decode(format, table) {
        Some(table) => Ok(table),
        None => damaged("page table has entries behind the last page"),
    }
}

/// Checks head, page table and the hashes of `pages` against each other and against the job.
pub(super) fn verify(
    job: &LoadJob,
    head: &[u8],
    table: &[u8],
    pages: &Range<usize>,
    computed: &[u64],
) -> Result<()> {
    let table = verify_frame(job, head, table)?;
    let expected = table.pages(pages.clone());
    if expected == computed {
        return Ok(());
    }
    let bad = expected
        .iter()
        .zip(computed)
        .position(|(expected, found)| expected != found);
    let page = bad.map_or(pages.end, |index| pages.start + index);
    Err(bad_page(&job.cache.format, page))
}

/// Pages that are hashed and then copied together: 256 KiB stay in the cache of one core.
const WINDOW_PAGES: usize = 64;

/// Checks whole pages, of which the first is `first_page` of the payload, and hands what the job
/// wants of them to `scatter`: each window right after it was found good, so that the copy finds
/// it in the CPU's cache.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a page that is not what was stored; nothing of its window was copied.
pub(super) fn verify_into(
    job: &LoadJob,
    table: &PageTable,
    first_page: usize,
    pages: &[u8],
    scatter: &mut Scatter<'_>,
) -> Result<()> {
    for (index, window) in pages.chunks(WINDOW_PAGES * PAGE_BYTES).enumerate() {
        let first = first_page + index * WINDOW_PAGES;
        verify_pages(&job.cache.format, table, first, window)?;
        let start = first * PAGE_BYTES;
        let wanted = job.payload.start.max(start)..job.payload.end.min(start + window.len());
        if wanted.is_empty() {
            continue;
        }
        scatter.write(image::bytes_of(
            window,
            wanted.start - start..wanted.end - start,
        )?)?;
    }
    Ok(())
}

/// Checks whole pages, of which the first is `first` of the payload.
///
/// # Errors
/// [`ErrorKind::Damaged`] for a page that is not what was stored.
pub(super) fn verify_pages(
    format: &ChunkFormat,
    table: &PageTable,
    first: usize,
    pages: &[u8],
) -> Result<()> {
    let end = first + pages.len() / PAGE_BYTES;
    let expected = table.pages(first..end);
    // Fewer entries than pages cannot be compared, so they are no match.
    let bad = match first_bad_page(pages, expected) {
        None if expected.len() == end - first => None,
        None => Some(expected.len()),
        bad => bad,
    };
    bad.map_or(Ok(()), |bad| Err(bad_page(format, first + bad)))
}

/// Returns the error of a page that is not what was stored.
pub(super) fn bad_page(format: &ChunkFormat, page: usize) -> Error {
    let count = format.page_count();
    let message = format!("page {page} of {count} does not match its checksum");
    Error::new(ErrorKind::Damaged, message)
}
