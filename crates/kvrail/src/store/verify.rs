//! Whether what was read of a chunk file is what was stored.

use std::ops::Range;

use super::load_job::LoadJob;
use crate::chunk::{ChunkHead, PAGE_BYTES, PageTable, hash_pages, root_checksum};
use crate::error::{Error, ErrorKind, Result};

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
    let damaged = |message: &str| Err(Error::new(ErrorKind::Damaged, message));
    let format = &job.cache.format;
    let root = ChunkHead::check(head, &job.cache.head_fields(job.chunk), format)?;
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
    let count = job.cache.format.page_count();
    let message = format!("page {page} of {count} does not match its checksum");
    Err(Error::new(ErrorKind::Damaged, message))
}
