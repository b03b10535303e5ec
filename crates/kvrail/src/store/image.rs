//! The image of a chunk file in a staging buffer, and the moving of it.
//!
//! A staging buffer holds a chunk exactly as the file does: head, payload, page table. So a store
//! is one contiguous range, and nothing is copied between memory and the engine.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::chunk::{ChunkFormat, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoEngine, IoFile, IoHandle, IoRequest, Operation};
use crate::memory::StagingRange;

/// Bytes of one request of cuFile: its largest transfer.
pub(super) const CUFILE_REQUEST_BYTES: usize = 16 << 20;

/// A part of a file image in flight.
#[derive(Debug)]
pub(super) struct Part {
    /// Bytes from the file's start.
    pub(super) offset: usize,
    handle: IoHandle,
}

impl Part {
    /// Waits for the part.
    pub(super) fn wait(self, deadline: Instant) -> Result<StagingRange> {
        self.handle.wait(deadline)
    }
}

/// Submits `image`, which is `ranges` of the file one behind the other, all at once and in requests
/// as large as the engine likes them.
pub(super) fn submit(
    engine: &dyn IoEngine,
    operation: Operation,
    file: &Arc<IoFile>,
    ranges: &[Range<usize>],
    mut image: StagingRange,
) -> Vec<Part> {
    let most = engine.request_bytes(operation);
    let (mut offsets, mut requests) = (Vec::new(), Vec::new());
    for range in ranges {
        for offset in range.clone().step_by(most) {
            offsets.push(offset);
            requests.push(IoRequest {
                operation,
                file: Arc::clone(file),
                offset: offset as u64,
                buffer: image.split_to(most.min(range.end - offset)),
            });
        }
    }
    let handles = engine.submit_all(requests);
    let parts = offsets.into_iter().zip(handles);
    parts
        .map(|(offset, handle)| Part { offset, handle })
        .collect()
}

/// Puts the parts of an image together again, in their order.
///
/// # Errors
/// The first error among them, or [`ErrorKind::InvalidArgument`] when they are no parts of one.
pub(super) fn rejoin(parts: Vec<Result<StagingRange>>) -> Result<StagingRange> {
    let mut parts = parts.into_iter();
    let nothing = || Error::new(ErrorKind::InvalidArgument, "an image without parts");
    let mut image = parts.next().ok_or_else(nothing)??;
    for part in parts {
        image.rejoin(part?).map_err(|_| {
            Error::new(
                ErrorKind::InvalidArgument,
                "I/O engine gave back another buffer",
            )
        })?;
    }
    Ok(image)
}

/// Which parts of a file a load of some blocks needs, as ranges of pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extents {
    /// Page-aligned file ranges, ascending, adjacent ones merged: head, pages, page table.
    pub(super) ranges: Vec<Range<usize>>,
    /// Payload pages that are read.
    pub(super) pages: Range<usize>,
}

impl Extents {
    /// Returns what the payload bytes `payload` need: whole pages, verified alone.
    pub(super) fn new(format: &ChunkFormat, payload: &Range<usize>) -> Self {
        let pages = payload.start / PAGE_BYTES..payload.end.div_ceil(PAGE_BYTES);
        let start = format.payload_offset();
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(3);
        for next in [
            0..PAGE_BYTES,
            start + pages.start * PAGE_BYTES..start + pages.end * PAGE_BYTES,
            format.table_offset()..format.file_bytes(),
        ] {
            match ranges.last_mut() {
                Some(last) if last.end == next.start => last.end = next.end,
                _ => ranges.push(next),
            }
        }
        Self { ranges, pages }
    }

    /// Returns whether that is the whole file.
    pub(super) fn is_whole(&self, format: &ChunkFormat) -> bool {
        self.pages == (0..format.page_count())
    }
}

/// Returns head and page table of what was read of a chunk: head, pages, table.
pub(super) fn frame<'a>(image: &'a [u8], extents: &Extents) -> Result<(&'a [u8], &'a [u8])> {
    let table = PAGE_BYTES + extents.pages.len() * PAGE_BYTES;
    let bytes: usize = extents.ranges.iter().map(Range::len).sum();
    Ok((
        bytes_of(image, 0..PAGE_BYTES)?,
        bytes_of(image, table..bytes)?,
    ))
}

/// Returns a range of an image as bytes.
pub(super) fn bytes_of(image: &[u8], range: Range<usize>) -> Result<&[u8]> {
    image.get(range).ok_or_else(outside)
}

/// Returns a range of an image as bytes for writing.
pub(super) fn bytes_mut(image: &mut [u8], range: Range<usize>) -> Result<&mut [u8]> {
    image.get_mut(range).ok_or_else(outside)
}

fn outside() -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        "range outside the staging buffer",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn extents_hold_head_table_and_every_wanted_byte(
            blocks in 1_usize..20, bytes in 1_usize..20_000, first in 0_usize..20,
        ) {
            let first = first % blocks;
            let format = ChunkFormat::new([blocks, 1, bytes]).unwrap();
            let payload = first * bytes..format.payload_bytes();
            let extents = Extents::new(&format, &payload);
            let holds = |at: usize| extents.ranges.iter().any(|range| range.contains(&at));
            prop_assert!(holds(0) && holds(format.file_bytes() - 1));
            prop_assert!(holds(4096 + payload.start) && holds(4096 + payload.end - 1));
            prop_assert!(extents.ranges.iter().all(|r| r.start % 4096 == 0 && r.end % 4096 == 0));
            prop_assert!(extents.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            if first == 0 {
                prop_assert_eq!(extents.ranges.len(), 1);
                prop_assert_eq!(&extents.ranges[0], &(0..format.file_bytes()));
            }
        }
    }
}
