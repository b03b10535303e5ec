//! What the kernels do, on the CPU, from the same descriptors: for tests and for mocks.
#![expect(
    unsafe_code,
    reason = "follows addresses in descriptors, as the kernels do"
)]

use std::ptr;

use twox_hash::XxHash3_64;

use super::{CopyDescriptor, HashDescriptor, PAGE_BYTES, Pages, PieceGrid};

/// Does what `kvrail_copy` does.
///
/// # Safety
/// Sources are readable and targets writable by the CPU, and no target overlaps anything else.
pub unsafe fn copy(descriptors: &[CopyDescriptor]) {
    for descriptor in descriptors {
        let source = ptr::with_exposed_provenance::<u8>(descriptor.source as usize);
        let target = ptr::with_exposed_provenance_mut::<u8>(descriptor.target as usize);
        // SAFETY: the caller vouches for the ranges.
        unsafe { ptr::copy_nonoverlapping(source, target, descriptor.bytes as usize) };
    }
}

/// Does what `kvrail_hash_pages` does.
///
/// # Safety
/// Sources are readable, and `hashes` is writable at every index that a descriptor names.
pub unsafe fn hash_pages(descriptors: &[HashDescriptor], hashes: *mut u64) {
    for descriptor in descriptors {
        for page in 0..descriptor.pages as usize {
            let address = descriptor.source as usize + page * PAGE_BYTES;
            let start = ptr::with_exposed_provenance::<u8>(address);
            // SAFETY: the caller vouches for the pages.
            let bytes = unsafe { std::slice::from_raw_parts(start, PAGE_BYTES) };
            let hash = XxHash3_64::oneshot(bytes);
            // SAFETY: the caller vouches for the index.
            let target = unsafe { hashes.add(descriptor.first_page as usize + page) };
            // SAFETY: as above; the address may have any alignment.
            unsafe { target.write_unaligned(hash) };
        }
    }
}

/// Does what `kvrail_gather_hashed` does.
///
/// # Safety
/// As for [`Kernels::gather_hashed`](super::Kernels::gather_hashed), with addresses that the CPU
/// reads and writes.
pub unsafe fn gather_hashed(pieces: &[CopyDescriptor], pages: Pages, entries: usize) {
    for piece in pieces {
        if piece.source == 0 {
            let target = ptr::with_exposed_provenance_mut::<u8>(piece.target as usize);
            // SAFETY: the caller vouches for the range.
            unsafe { target.write_bytes(0, piece.bytes as usize) };
        } else {
            // SAFETY: as above.
            unsafe { copy(&[*piece]) };
        }
    }
    let all = HashDescriptor {
        source: pages.address,
        first_page: 0,
        pages: pages.count as u64,
    };
    let hashes = ptr::with_exposed_provenance_mut::<u64>(pages.hashes as usize);
    // SAFETY: the caller vouches for pages and hashes.
    unsafe { hash_pages(&[all], hashes) };
    // SAFETY: the caller vouches for the entries.
    let behind = unsafe { hashes.add(pages.count) };
    // SAFETY: as above.
    unsafe { behind.write_bytes(0, entries - pages.count) };
}

/// Does what `kvrail_scatter_verified` does; returns the number of the first page whose hash is
/// not the expected one.
///
/// # Safety
/// As for [`Kernels::scatter_verified`](super::Kernels::scatter_verified), with addresses that the
/// CPU reads and writes.
pub unsafe fn scatter_verified(pieces: &[CopyDescriptor], pages: Pages) -> Option<u64> {
    let mut bad = None;
    for page in 0..pages.count {
        let start = pages.address + (page * PAGE_BYTES) as u64;
        let end = start + PAGE_BYTES as u64;
        let bytes = ptr::with_exposed_provenance::<u8>(start as usize);
        // SAFETY: the caller vouches for the pages.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, PAGE_BYTES) };
        let expected = ptr::with_exposed_provenance::<u64>(pages.hashes as usize);
        // SAFETY: the caller vouches for the hashes.
        let expected = unsafe { expected.add(page) };
        // SAFETY: as above; the address may have any alignment.
        let expected = unsafe { expected.read_unaligned() };
        if XxHash3_64::oneshot(bytes) != expected {
            bad = bad.or(Some(page as u64));
            continue;
        }
        for piece in pieces {
            let from = piece.source.max(start);
            let to = (piece.source + piece.bytes).min(end);
            if from < to {
                let part = CopyDescriptor {
                    source: from,
                    target: piece.target + (from - piece.source),
                    bytes: to - from,
                };
                // SAFETY: a part of a piece that the caller vouches for.
                unsafe { copy(&[part]) };
            }
        }
    }
    bad
}

/// Returns a grid as the copies of [`gather_hashed`], the zeros behind it included.
pub fn gather_copies(grid: &PieceGrid, pages: Pages) -> Vec<CopyDescriptor> {
    let mut copies = grid.copies(pages.address, true);
    let zeros = (pages.count * PAGE_BYTES) as u64 - grid.bytes();
    if zeros > 0 {
        copies.push(CopyDescriptor {
            source: 0,
            target: pages.address + grid.bytes(),
            bytes: zeros,
        });
    }
    copies
}
