//! What work on a stream does when it runs.

use std::ffi::c_int;
use std::ptr;

use kvrail_cuda::{CopyDescriptor, HashDescriptor, reference};
use mock_script::Action;

use crate::memory::memory;
use crate::streams::Work;

const ILLEGAL_ADDRESS: c_int = 700;

/// Performs one piece of work; returns its error, 0 for none.
pub(crate) fn perform(work: Work) -> c_int {
    match work {
        Work::Copy {
            action,
            target,
            source,
            bytes,
            // SAFETY: whoever put the copy on the stream keeps both ends until it waited for it.
        } => unsafe { transfer(action, target, source, bytes) },
        Work::CopyKernel {
            action,
            descriptors,
            number,
            // SAFETY: as the kernel's contract says.
        } => unsafe { run_copy(descriptors, number, action) },
        Work::HashKernel {
            action,
            descriptors,
            number,
            hashes,
            // SAFETY: as the kernel's contract says.
        } => unsafe { run_hash(descriptors, number, hashes, action) },
        Work::Record(..) | Work::Wait(..) => 0,
    }
}

/// Copies between addresses of which either may be the device's.
unsafe fn transfer(action: Option<Action>, target: u64, source: u64, bytes: usize) -> c_int {
    let memory = memory();
    let at = |address| {
        if memory.is_device(address) {
            return memory.alias(address, bytes);
        }
        (address != 0).then(|| ptr::with_exposed_provenance_mut(address as usize))
    };
    let (Some(target), Some(source)) = (at(target), at(source)) else {
        return ILLEGAL_ADDRESS;
    };
    // SAFETY: device ranges were checked, host ranges are the caller's.
    unsafe { ptr::copy(source, target, bytes) };
    if action == Some(Action::Flip) && bytes > 0 {
        // SAFETY: inside the range.
        let middle = unsafe { target.add(bytes / 2) };
        // SAFETY: as above.
        unsafe { *middle ^= 4 };
    }
    0
}

unsafe fn run_copy(descriptors: u64, number: usize, action: Option<Action>) -> c_int {
    let memory = memory();
    let Some(list) = memory.alias(descriptors, number * size_of::<CopyDescriptor>()) else {
        return ILLEGAL_ADDRESS;
    };
    // SAFETY: the range was checked; descriptors are plain numbers.
    let list = unsafe { std::slice::from_raw_parts(list.cast::<CopyDescriptor>(), number) };
    let mut translated = Vec::with_capacity(number);
    for piece in list {
        let bytes = piece.bytes as usize;
        let ends = (
            memory.alias(piece.source, bytes),
            memory.alias(piece.target, bytes),
        );
        let (Some(source), Some(target)) = ends else {
            return ILLEGAL_ADDRESS;
        };
        translated.push(CopyDescriptor {
            source: source.expose_provenance() as u64,
            target: target.expose_provenance() as u64,
            bytes: piece.bytes,
        });
    }
    // SAFETY: all ranges were checked.
    unsafe { reference::copy(&translated) };
    if let (Some(Action::Flip), Some(last)) = (action, translated.last()) {
        let target = ptr::with_exposed_provenance_mut::<u8>(last.target as usize);
        // SAFETY: the first byte of a range that was checked.
        unsafe { *target ^= 1 };
    }
    0
}

unsafe fn run_hash(descriptors: u64, number: usize, hashes: u64, action: Option<Action>) -> c_int {
    let memory = memory();
    let Some(list) = memory.alias(descriptors, number * size_of::<HashDescriptor>()) else {
        return ILLEGAL_ADDRESS;
    };
    // SAFETY: the range was checked; descriptors are plain numbers.
    let list = unsafe { std::slice::from_raw_parts(list.cast::<HashDescriptor>(), number) };
    for run in list {
        let pages = run.pages as usize;
        let source = memory.alias(run.source, pages * 4096);
        let target = memory.alias(hashes + run.first_page * 8, pages * 8);
        let (Some(source), Some(target)) = (source, target) else {
            return ILLEGAL_ADDRESS;
        };
        let translated = HashDescriptor {
            source: source.expose_provenance() as u64,
            first_page: 0,
            pages: run.pages,
        };
        // SAFETY: both ranges were checked.
        unsafe { reference::hash_pages(&[translated], target.cast()) };
        if action == Some(Action::Flip) && pages > 0 {
            // SAFETY: the first byte of a range that was checked.
            unsafe { *target ^= 1 };
        }
    }
    0
}
