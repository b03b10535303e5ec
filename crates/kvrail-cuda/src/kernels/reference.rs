//! What the kernels do, on the CPU, from the same descriptors: for tests and for mocks.
#![expect(
    unsafe_code,
    reason = "follows addresses in descriptors, as the kernels do"
)]

use std::ptr;

use twox_hash::XxHash3_64;

use super::{CopyDescriptor, HashDescriptor, PAGE_BYTES};

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
