//! The lengths of a chunk file, all fixed by the shape of its payload.

use crate::error::{Error, ErrorKind, Result};

/// The version this library writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of a page: the unit of alignment on disk and of verification.
///
/// 4096 is the largest alignment that O_DIRECT asks for on common file systems, and the
/// smallest file offset and length that cuFile moves without a bounce buffer.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of one entry of the page table.
pub(super) const ENTRY_BYTES: usize = 8;

/// The largest payload accepted: far above any real chunk, low enough that no sum overflows.
const PAYLOAD_BYTES_MAX: usize = 1 << 40;

/// The shape of a chunk's payload and the lengths that follow from it.
///
/// The payload holds, for each block, for each layer, that layer's block bytes. Its shape is
/// `[blocks, layers, bytes]`, or `[blocks, 1, bytes]` where layers differ in size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkFormat {
    shape: [usize; 3],
}

impl ChunkFormat {
    /// Makes the format of a payload of shape `[blocks, layers, bytes]`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when a side is zero or the payload is beyond 1 TiB.
    pub fn new(shape: [usize; 3]) -> Result<Self> {
        let bytes = shape
            .iter()
            .try_fold(1_usize, |product, side| product.checked_mul(*side));
        match bytes {
            Some(1..=PAYLOAD_BYTES_MAX) => Ok(Self { shape }),
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("payload of shape {shape:?}: expected 1 byte to 1 TiB"),
            )),
        }
    }

    /// Returns the shape `[blocks, layers or 1, bytes]`.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Returns the bytes of the payload, without padding.
    pub fn payload_bytes(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the bytes of one block of the payload, over all layers.
    pub fn block_bytes(&self) -> usize {
        let [_, layers, bytes] = self.shape;
        layers * bytes
    }

    /// Returns the pages of the payload; the last one is padded with zeros.
    pub fn page_count(&self) -> usize {
        self.payload_bytes().div_ceil(PAGE_BYTES)
    }

    /// Returns the zero bytes behind the payload, up to the next page.
    pub fn pad_bytes(&self) -> usize {
        self.page_count() * PAGE_BYTES - self.payload_bytes()
    }

    /// Returns the entries of the page table: one per page, rounded up to a whole page of them.
    pub fn table_entries(&self) -> usize {
        self.page_count().next_multiple_of(PAGE_BYTES / ENTRY_BYTES)
    }

    /// Returns the bytes of the page table, a multiple of [`PAGE_BYTES`].
    pub fn table_bytes(&self) -> usize {
        self.table_entries() * ENTRY_BYTES
    }

    /// Returns where the payload starts in the file.
    pub fn payload_offset(&self) -> usize {
        PAGE_BYTES
    }

    /// Returns where the page table starts in the file.
    pub fn table_offset(&self) -> usize {
        PAGE_BYTES + self.page_count() * PAGE_BYTES
    }

    /// Returns the bytes of the whole file, a multiple of [`PAGE_BYTES`].
    pub fn file_bytes(&self) -> usize {
        self.table_offset() + self.table_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_follow_each_other_and_are_whole_pages(
            blocks in 1_usize..64, layers in 1_usize..100, bytes in 1_usize..70_000,
        ) {
            let format = ChunkFormat::new([blocks, layers, bytes]).unwrap();
            let payload = format.payload_bytes() + format.pad_bytes();
            prop_assert_eq!(payload % PAGE_BYTES, 0);
            prop_assert!(format.pad_bytes() < PAGE_BYTES);
            prop_assert_eq!(format.table_offset(), format.payload_offset() + payload);
            prop_assert_eq!(format.file_bytes() % PAGE_BYTES, 0);
            prop_assert!(format.table_entries() >= format.page_count());
        }
    }

    #[test]
    fn empty_and_absurd_shapes_are_refused() {
        assert!(ChunkFormat::new([0, 1, 1]).is_err());
        assert!(ChunkFormat::new([1 << 30, 1 << 30, 1 << 30]).is_err());
    }
}
