//! Two levels of checksums: XXH3-64 of each payload page, and XXH3-64 of the table of those.
//!
//! Two levels, so that any range of blocks can be verified without the rest, and so that a GPU
//! can hash pages in parallel. XXH3 guards against accidents (bit rot, torn or misplaced writes),
//! not against somebody who can write to the directory.

use std::hash::Hasher;
use std::ops::Range;

use twox_hash::XxHash3_64;

use super::format::{ChunkFormat, ENTRY_BYTES, PAGE_BYTES};

/// Hashes each whole page of `pages` into `table`, in order.
///
/// Hashes as many pages as both sides have; a partial page at the end is left out.
pub fn hash_pages(pages: &[u8], table: &mut [u64]) {
    for (page, entry) in pages.chunks_exact(PAGE_BYTES).zip(table) {
        *entry = XxHash3_64::oneshot(page);
    }
}

/// Returns the first page whose hash is not the expected one, as an index into both.
pub fn first_bad_page(pages: &[u8], expected: &[u64]) -> Option<usize> {
    pages
        .chunks_exact(PAGE_BYTES)
        .zip(expected)
        .position(|(page, entry)| XxHash3_64::oneshot(page) != *entry)
}

/// Returns the root checksum: XXH3-64 of the encoded page table, its zero entries included.
pub fn root_checksum(encoded_table: &[u8]) -> u64 {
    XxHash3_64::oneshot(encoded_table)
}

/// The root checksum of a page table that comes in pieces.
#[derive(Default)]
pub struct RootHasher(XxHash3_64);

impl RootHasher {
    /// Adds the next bytes of the encoded page table.
    pub fn add(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// Returns what [`root_checksum`] gives for all pieces together.
    pub fn root(&self) -> u64 {
        self.0.finish()
    }
}

impl std::fmt::Debug for RootHasher {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "RootHasher({:016x})", self.root())
    }
}

/// The XXH3-64 of each payload page of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTable {
    entries: Vec<u64>,
    pages: usize,
}

impl PageTable {
    /// Makes a table of zeros for `format`.
    pub fn new(format: &ChunkFormat) -> Self {
        Self {
            entries: vec![0; format.table_entries()],
            pages: format.page_count(),
        }
    }

    /// Reads a table from its bytes in the file (`u64` little endian).
    ///
    /// Returns `None` unless the length fits `format` and the entries behind the last page are
    /// zero.
    pub fn decode(format: &ChunkFormat, bytes: &[u8]) -> Option<Self> {
        if bytes.len() != format.table_bytes() {
            return None;
        }
        let entries = Self::decode_entries(bytes);
        let unused = entries.get(format.page_count()..)?;
        if unused.iter().any(|entry| *entry != 0) {
            return None;
        }
        Some(Self {
            entries,
            pages: format.page_count(),
        })
    }

    /// Reads some entries of a table from their bytes in the file.
    pub fn decode_entries(bytes: &[u8]) -> Vec<u64> {
        bytes
            .chunks_exact(ENTRY_BYTES)
            .filter_map(|entry| entry.try_into().ok().map(u64::from_le_bytes))
            .collect()
    }

    /// Writes the table to its place in the file.
    ///
    /// Writes as many entries as `target` has room for; the caller passes
    /// [`ChunkFormat::table_bytes`] bytes.
    pub fn encode_into(&self, target: &mut [u8]) {
        for (entry, bytes) in self
            .entries
            .iter()
            .zip(target.chunks_exact_mut(ENTRY_BYTES))
        {
            bytes.copy_from_slice(&entry.to_le_bytes());
        }
    }

    /// Returns the entries of `pages`, empty where the range is beyond the payload.
    pub fn pages(&self, pages: Range<usize>) -> &[u64] {
        if pages.end > self.pages {
            return &[];
        }
        self.entries.get(pages).unwrap_or_default()
    }

    /// Returns the entries of all payload pages, to be filled.
    pub fn pages_mut(&mut self) -> &mut [u64] {
        let pages = self.pages;
        self.entries.get_mut(..pages).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_in_any_page_is_found() {
        let format = ChunkFormat::new([3, 1, PAGE_BYTES]).unwrap();
        let mut payload: Vec<u8> = (0..3 * PAGE_BYTES).map(|i| (i * 31 % 251) as u8).collect();
        let mut table = PageTable::new(&format);
        hash_pages(&payload, table.pages_mut());
        assert_eq!(first_bad_page(&payload, table.pages(0..3)), None);
        for page in 0..3 {
            payload[page * PAGE_BYTES + 17] ^= 4;
            assert_eq!(first_bad_page(&payload, table.pages(0..3)), Some(page));
            payload[page * PAGE_BYTES + 17] ^= 4;
        }
    }

    #[test]
    fn a_root_of_pieces_is_that_of_the_whole() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| (i * 31 % 251) as u8).collect();
        for size in [1, 8, 4096, 9_999, 20_000] {
            let mut hasher = RootHasher::default();
            bytes.chunks(size).for_each(|piece| hasher.add(piece));
            assert_eq!(hasher.root(), root_checksum(&bytes), "pieces of {size}");
        }
    }

    #[test]
    fn a_table_round_trips_and_its_unused_entries_must_be_zero() {
        let format = ChunkFormat::new([2, 1, PAGE_BYTES]).unwrap();
        let mut table = PageTable::new(&format);
        table.pages_mut().copy_from_slice(&[7, 9]);
        let mut bytes = vec![0; format.table_bytes()];
        table.encode_into(&mut bytes);
        assert_eq!(PageTable::decode(&format, &bytes), Some(table));
        bytes[4000] = 1;
        assert_eq!(PageTable::decode(&format, &bytes), None);
        assert_eq!(PageTable::decode(&format, &bytes[8..]), None);
    }
}
