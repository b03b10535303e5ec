//! What work on a stream does when it runs.

use std::ffi::c_int;
use std::ptr;

use kvrail_cuda::{CopyDescriptor, HashDescriptor, Pages, reference};
use mock_script::Action;

use crate::memory::{Memory, memory};
use crate::streams::{Pieces, Work};

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
        Work::PagesKernel {
            action,
            gathers,
            pieces,
            pages,
            last,
            // SAFETY: as the kernels' contracts say.
        } => unsafe { run_on_pages(gathers, &pieces, pages, last, action) },
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

/// Reads copy descriptors from device memory, as [`reachable`].
unsafe fn pieces(descriptors: u64, number: usize) -> Option<Vec<CopyDescriptor>> {
    let memory = memory();
    let list = memory.alias(descriptors, number * size_of::<CopyDescriptor>())?;
    // SAFETY: the range was checked; descriptors are plain numbers.
    let list = unsafe { std::slice::from_raw_parts(list.cast::<CopyDescriptor>(), number) };
    reachable(&memory, list)
}

/// Puts addresses that the CPU may touch into copies; address 0 stays.
fn reachable(memory: &Memory, list: &[CopyDescriptor]) -> Option<Vec<CopyDescriptor>> {
    let at = |address: u64, bytes: u64| match address {
        0 => Some(0),
        _ => Some(memory.alias(address, bytes as usize)?.expose_provenance() as u64),
    };
    let translated = |piece: &CopyDescriptor| {
        Some(CopyDescriptor {
            source: at(piece.source, piece.bytes)?,
            target: at(piece.target, piece.bytes)?,
            bytes: piece.bytes,
        })
    };
    list.iter().map(translated).collect()
}

/// Flips a bit of what a kernel that copies wrote last.
unsafe fn flip_last(pieces: &[CopyDescriptor], action: Option<Action>) {
    if let (Some(Action::Flip), Some(last)) = (action, pieces.last()) {
        let target = ptr::with_exposed_provenance_mut::<u8>(last.target as usize);
        // SAFETY: the first byte of a range that was checked.
        unsafe { *target ^= 1 };
    }
}

unsafe fn run_copy(descriptors: u64, number: usize, action: Option<Action>) -> c_int {
    // SAFETY: as the kernel's contract says.
    let Some(pieces) = (unsafe { pieces(descriptors, number) }) else {
        return ILLEGAL_ADDRESS;
    };
    if pieces
        .iter()
        .any(|piece| piece.source == 0 || piece.target == 0)
    {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: all ranges were checked.
    unsafe { reference::copy(&pieces) };
    // SAFETY: as above.
    unsafe { flip_last(&pieces, action) };
    0
}

/// Runs one of the kernels that copy and hash; anything outside device memory is an illegal address.
unsafe fn run_on_pages(
    gathers: bool,
    from: &Pieces,
    pages: Pages,
    last: u64,
    action: Option<Action>,
) -> c_int {
    let list = match from {
        Pieces::List {
            descriptors,
            number,
            // SAFETY: as the kernel's contract says.
        } => unsafe { pieces(*descriptors, *number) },
        Pieces::Grid(grid) if gathers => {
            reachable(&memory(), &reference::gather_copies(grid, pages))
        }
        Pieces::Grid(grid) => reachable(&memory(), &grid.copies(pages.address, false)),
    };
    let Some(list) = list else {
        return ILLEGAL_ADDRESS;
    };
    let entries = if gathers { last as usize } else { pages.count };
    let (image, hashes, bad) = {
        let memory = memory();
        let at = |address, bytes| {
            memory
                .alias(address, bytes)
                .map(<*mut u8>::expose_provenance)
        };
        (
            at(pages.address, pages.count * 4096),
            at(pages.hashes, entries * 8),
            memory.alias(last, 8).or_else(|| {
                let pinned = memory.is_pinned(last) && memory.is_pinned(last + 7);
                pinned.then(|| ptr::with_exposed_provenance_mut(last as usize))
            }),
        )
    };
    let (Some(image), Some(hashes)) = (image, hashes) else {
        return ILLEGAL_ADDRESS;
    };
    // On the side of the pages nothing lies outside them or leaves a gap.
    let side = |piece: &CopyDescriptor| if gathers { piece.target } else { piece.source };
    let end = image + pages.count * 4096;
    let contiguous = list.windows(2).all(|pair| match pair {
        [one, next] => side(one) + one.bytes == side(next),
        _ => true,
    });
    let inside = list.iter().all(|piece| {
        piece.bytes > 0
            && (piece.source | piece.target | piece.bytes).is_multiple_of(16)
            && piece.target != 0
            && side(piece) >= image as u64
            && side(piece) + piece.bytes <= end as u64
    });
    let whole: u64 = list.iter().map(|piece| piece.bytes).sum();
    if !contiguous || !inside || gathers && whole != (pages.count * 4096) as u64 {
        return ILLEGAL_ADDRESS;
    }
    let translated = Pages {
        address: image as u64,
        count: pages.count,
        hashes: hashes as u64,
    };
    if gathers {
        // SAFETY: all ranges were checked.
        unsafe { reference::gather_hashed(&list, translated, entries) };
    } else {
        let Some(bad) = bad else {
            return ILLEGAL_ADDRESS;
        };
        let bad = bad.cast::<u64>();
        // SAFETY: as above.
        if let Some(page) = unsafe { reference::scatter_verified(&list, translated) } {
            // SAFETY: eight bytes that were checked.
            let before = unsafe { bad.read_unaligned() };
            // SAFETY: as above.
            unsafe { bad.write_unaligned(before.min(page)) };
        }
    }
    // SAFETY: all ranges were checked.
    unsafe { flip_last(&list, action) };
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
