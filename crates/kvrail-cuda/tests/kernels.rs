//! The kernels' source, run on the CPU behind a shim, against their reference and against XXH3.
#![expect(unsafe_code, reason = "calls compiled kernels on memory of the test")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::path::Path;
use std::process::Command;

use kvrail_cuda::{CopyDescriptor, HashDescriptor, PAGE_BYTES, Pages, PieceGrid, reference};
use libloading::Library;
use twox_hash::XxHash3_64;

/// Entry points around the kernels' source.
const MAIN: &str = r#"
#include "shim.h"
#include "kvrail.cu"
extern "C" void run_copy(unsigned blocks, const CopyDescriptor *descriptors, u64 count) {
    launch(blocks, 256, [&] { kvrail_copy(descriptors, count); });
}
extern "C" void run_hash(unsigned blocks, const HashDescriptor *descriptors, u64 count, u64 pages,
                         u64 *hashes) {
    launch(blocks, 128, [&] { kvrail_hash_pages(descriptors, count, pages, hashes); });
}
extern "C" void run_gather(unsigned blocks, const CopyDescriptor *pieces, u64 count, u64 image,
                           u64 pages, u64 *hashes, u64 entries) {
    launch(blocks, 128, [&] { kvrail_gather_hashed(pieces, count, image, pages, hashes, entries); });
}
extern "C" void run_scatter(unsigned blocks, const CopyDescriptor *pieces, u64 count, u64 image,
                            u64 pages, const u64 *expected, u64 *bad) {
    launch(blocks, 128, [&] { kvrail_scatter_verified(pieces, count, image, pages, expected, bad); });
}
extern "C" void run_gather_grid(unsigned blocks, const PieceGrid *grid, u64 image, u64 pages,
                                u64 *hashes, u64 entries) {
    launch(blocks, 128, [&] { kvrail_gather_grid(*grid, image, pages, hashes, entries); });
}
extern "C" void run_scatter_grid(unsigned blocks, const PieceGrid *grid, u64 image, u64 pages,
                                 const u64 *expected, u64 *bad) {
    launch(blocks, 128, [&] { kvrail_scatter_grid(*grid, image, pages, expected, bad); });
}
"#;

/// Compiles the source for this machine; `None`, with the reason printed, without a C++ compiler.
fn compile() -> Option<Library> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (
        folder.path().join("main.cpp"),
        folder.path().join("kernels.so"),
    );
    std::fs::write(&source, MAIN).unwrap();
    let compiled = Command::new("c++")
        .args([
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wno-unknown-pragmas",
        ])
        .arg("-I")
        .arg(root.join("tests"))
        .arg("-I")
        .arg(root.join("src/kernels"))
        .arg("-o")
        .args([&target, &source])
        .output();
    let output = match compiled {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: no C++ compiler: {error}");
            return None;
        }
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // SAFETY: the library was just made; it has no initialisers of its own.
    Some(unsafe { Library::new(&target) }.unwrap())
}

fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(next).collect()
}

#[test]
fn pieces_of_every_alignment_and_length_are_copied() {
    type Run = unsafe extern "C" fn(u32, *const CopyDescriptor, u64);
    let Some(library) = compile() else { return };
    // SAFETY: the function's type is that of MAIN.
    let run = unsafe { library.get::<Run>(b"run_copy") }.unwrap();
    let source = pattern(200_000);
    let mut cuts = vec![(0, 0, 65_536), (65_536, 65_536, 16)];
    let mut at: usize = 65_600;
    for bytes in [1, 2, 3, 15, 16, 17, 255, 4095, 4096, 5000, 16_384] {
        for shift in [0, 1, 4, 8] {
            cuts.push((at, at + shift, bytes));
            at = (at + bytes + 32).next_multiple_of(16);
        }
    }
    assert!(at + 64 < source.len(), "{at}");
    let copied = |by: &dyn Fn(&[CopyDescriptor])| {
        let mut target = vec![0_u8; source.len() + 16];
        let start = target.as_mut_ptr().expose_provenance().next_multiple_of(16) as u64;
        let base = source.as_ptr().expose_provenance() as u64;
        // Sources keep their alignment relative to the target's by starting at a multiple of 16.
        let skew = base.next_multiple_of(16) - base;
        let descriptors: Vec<CopyDescriptor> = cuts
            .iter()
            .map(|&(from, to, bytes)| CopyDescriptor {
                source: base + skew + from as u64,
                target: start + to as u64,
                bytes: bytes as u64,
            })
            .collect();
        by(&descriptors);
        let offset = (start - target.as_ptr().expose_provenance() as u64) as usize;
        target.drain(..offset);
        target.truncate(source.len());
        (target, skew as usize)
    };
    let (expected, skew) = copied(&|descriptors| {
        // SAFETY: the pieces lie in source and target.
        unsafe { reference::copy(descriptors) };
    });
    for &(from, to, bytes) in &cuts {
        assert_eq!(
            expected[to..to + bytes],
            source[from + skew..from + skew + bytes]
        );
    }
    for blocks in [1, 7, 200] {
        let (found, _) = copied(&|descriptors| {
            // SAFETY: as above.
            unsafe { run(blocks, descriptors.as_ptr(), descriptors.len() as u64) };
        });
        assert!(found == expected, "{blocks} blocks");
    }
}

#[test]
fn pages_are_hashed_as_xxh3_does() {
    type Run = unsafe extern "C" fn(u32, *const HashDescriptor, u64, u64, *mut u64);
    let Some(library) = compile() else { return };
    // SAFETY: the function's type is that of MAIN.
    let run = unsafe { library.get::<Run>(b"run_hash") }.unwrap();
    let bytes = pattern(41 * PAGE_BYTES + 16);
    let base = bytes.as_ptr().expose_provenance().next_multiple_of(16);
    let skew = base - bytes.as_ptr().expose_provenance();
    // Runs in an order of their own, and one that leaves a gap in the hashes.
    let runs = [(0_usize, 20_usize, 13_usize), (13, 0, 20), (33, 34, 8)];
    let descriptors = runs.map(|(page, to, pages)| HashDescriptor {
        source: (base + page * PAGE_BYTES) as u64,
        first_page: to as u64,
        pages: pages as u64,
    });
    let mut expected = vec![0_u64; 42];
    for (page, to, pages) in runs {
        for index in 0..pages {
            let start = skew + (page + index) * PAGE_BYTES;
            expected[to + index] = XxHash3_64::oneshot(&bytes[start..start + PAGE_BYTES]);
        }
    }
    let mut hashes = vec![0_u64; 42];
    // SAFETY: the pages lie in `bytes`, the indices in `hashes`.
    unsafe { reference::hash_pages(&descriptors, hashes.as_mut_ptr()) };
    assert_eq!(hashes, expected);
    for blocks in [1, 2, 3] {
        let mut hashes = vec![0_u64; 42];
        // SAFETY: as above.
        unsafe { run(blocks, descriptors.as_ptr(), 3, 41, hashes.as_mut_ptr()) };
        assert_eq!(hashes, expected, "{blocks} blocks");
    }
}

/// Memory that begins at a multiple of 4096, as a slot's image does.
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "read by its address")] [u8; PAGE_BYTES]);

fn pages_of(count: usize, fill: u8) -> Vec<Page> {
    (0..count).map(|_| Page([fill; PAGE_BYTES])).collect()
}

fn bytes_of(pages: &[Page]) -> &[u8] {
    // SAFETY: pages are bytes, one behind the other.
    unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), size_of_val(pages)) }
}

fn address(pages: &[Page]) -> u64 {
    pages.as_ptr().expose_provenance() as u64
}

/// Lengths of pieces in turn, multiples of 16: one of one length, one of half pages as those of MLA,
/// one of pieces far below and above a page.
const LENGTHS: [&[usize]; 4] = [
    &[4096],
    &[18_432],
    &[16, 4080, 48, 12_288, 8_208, 32],
    &[5008, 5008, 80],
];

/// Pieces from somewhere in `other` for all but `last` bytes of `count` pages from `skip` on:
/// (place in `other`, place in the pages, length).
fn cut(lengths: &[usize], count: usize, skip: usize, last: usize) -> Vec<[usize; 3]> {
    let end = count * PAGE_BYTES - last;
    let mut at = skip;
    let mut pieces = Vec::new();
    for bytes in lengths.iter().cycle() {
        let bytes = (*bytes).min(end - at);
        if bytes == 0 {
            break;
        }
        // Places in `other` go backwards, with a gap between two of them.
        let place = 2 * count * PAGE_BYTES - (at - skip) - bytes - 16 * (pieces.len() % 97);
        pieces.push([place / 16 * 16, at, bytes]);
        at += bytes;
    }
    pieces
}

#[test]
fn pages_are_gathered_and_hashed_in_one_pass() {
    type Run = unsafe extern "C" fn(u32, *const CopyDescriptor, u64, u64, u64, *mut u64, u64);
    let Some(library) = compile() else { return };
    // SAFETY: the function's type is that of MAIN.
    let run = unsafe { library.get::<Run>(b"run_gather") }.unwrap();
    let count = 19;
    let mut source = pages_of(2 * count + 8, 0);
    let noise = pattern(size_of_val(&source[..]));
    // SAFETY: as long as the pages.
    unsafe {
        source
            .as_mut_ptr()
            .cast::<u8>()
            .copy_from(noise.as_ptr(), noise.len())
    };
    for (lengths, pad) in LENGTHS
        .iter()
        .flat_map(|lengths| [(*lengths, 0), (*lengths, 4064)])
    {
        let pieces = cut(lengths, count, 0, pad);
        let mut expected = Vec::new();
        for [from, _, bytes] in &pieces {
            expected.extend_from_slice(&noise[*from..from + bytes]);
        }
        expected.resize(count * PAGE_BYTES, 0);
        let mut table: Vec<u64> = expected
            .chunks(PAGE_BYTES)
            .map(XxHash3_64::oneshot)
            .collect();
        table.resize(count + 5, 0);
        let gathered = |by: &dyn Fn(&[CopyDescriptor], Pages)| {
            let image = pages_of(count, 0x5A);
            let mut hashes = vec![7_u64; count + 5];
            let mut list: Vec<CopyDescriptor> = pieces
                .iter()
                .map(|[from, to, bytes]| CopyDescriptor {
                    source: address(&source) + *from as u64,
                    target: address(&image) + *to as u64,
                    bytes: *bytes as u64,
                })
                .collect();
            if pad > 0 {
                list.push(CopyDescriptor {
                    source: 0,
                    target: address(&image) + (count * PAGE_BYTES - pad) as u64,
                    bytes: pad as u64,
                });
            }
            let pages = Pages {
                address: address(&image),
                count,
                hashes: hashes.as_mut_ptr().expose_provenance() as u64,
            };
            by(&list, pages);
            assert!(bytes_of(&image) == expected, "{lengths:?} {pad}");
            assert_eq!(hashes, table, "{lengths:?} {pad}");
        };
        gathered(&|list, pages| {
            // SAFETY: the pieces lie in `source` and fill the pages.
            unsafe { reference::gather_hashed(list, pages, count + 5) };
        });
        for blocks in [1, 3, 5] {
            gathered(&|list, pages| {
                let hashes = std::ptr::with_exposed_provenance_mut(pages.hashes as usize);
                let (start, number) = (list.as_ptr(), list.len() as u64);
                let (all, entries) = (count as u64, count as u64 + 5);
                // SAFETY: as above.
                unsafe { run(blocks, start, number, pages.address, all, hashes, entries) };
            });
        }
    }
}

#[test]
fn only_pages_that_are_what_they_should_be_are_scattered() {
    type Run =
        unsafe extern "C" fn(u32, *const CopyDescriptor, u64, u64, u64, *const u64, *mut u64);
    let Some(library) = compile() else { return };
    // SAFETY: the function's type is that of MAIN.
    let run = unsafe { library.get::<Run>(b"run_scatter") }.unwrap();
    let count = 19;
    let mut image = pages_of(count, 0);
    let noise = pattern(count * PAGE_BYTES);
    // SAFETY: as long as the pages.
    unsafe {
        image
            .as_mut_ptr()
            .cast::<u8>()
            .copy_from(noise.as_ptr(), noise.len())
    };
    let good: Vec<u64> = noise.chunks(PAGE_BYTES).map(XxHash3_64::oneshot).collect();
    let cases = [
        (0, 0, vec![]),
        (160, 0, vec![0]),
        (4080, 4064, vec![18, 5, 6]),
        (16, 32, vec![9]),
    ];
    for (lengths, (skip, last, bad)) in LENGTHS
        .iter()
        .flat_map(|lengths| cases.iter().map(move |case| (lengths, case)))
    {
        let pieces = cut(lengths, count, *skip, *last);
        let mut expected = vec![0xEE_u8; (2 * count + 8) * PAGE_BYTES];
        for [to, from, bytes] in &pieces {
            for index in (0..*bytes).filter(|index| !bad.contains(&((from + index) / PAGE_BYTES))) {
                expected[to + index] = noise[from + index];
            }
        }
        let mut hashes = good.clone();
        for page in bad {
            hashes[*page] ^= 1;
        }
        let first = bad.iter().min().map(|page| *page as u64);
        let scattered = |by: &dyn Fn(&[CopyDescriptor], Pages) -> Option<u64>| {
            let target = pages_of(2 * count + 8, 0xEE);
            let list: Vec<CopyDescriptor> = pieces
                .iter()
                .map(|[to, from, bytes]| CopyDescriptor {
                    source: address(&image) + *from as u64,
                    target: address(&target) + *to as u64,
                    bytes: *bytes as u64,
                })
                .collect();
            let pages = Pages {
                address: address(&image),
                count,
                hashes: hashes.as_ptr().expose_provenance() as u64,
            };
            assert_eq!(by(&list, pages), first, "{lengths:?} {skip} {last}");
            assert!(bytes_of(&target) == expected, "{lengths:?} {skip} {last}");
        };
        scattered(&|list, pages| {
            // SAFETY: the pieces lie in the pages and in `target`.
            unsafe { reference::scatter_verified(list, pages) }
        });
        for blocks in [1, 3, 5] {
            scattered(&|list, pages| {
                let hashes = std::ptr::with_exposed_provenance(pages.hashes as usize);
                let (start, number) = (list.as_ptr(), list.len() as u64);
                let mut found = u64::MAX;
                // SAFETY: as above.
                unsafe {
                    run(
                        blocks,
                        start,
                        number,
                        pages.address,
                        count as u64,
                        hashes,
                        &raw mut found,
                    );
                }
                (found != u64::MAX).then_some(found)
            });
        }
    }
}

/// Rows, pieces of a row, bytes of a piece, bytes between two in a row, and bytes before the first in
/// its page: of layers of half pages (MLA) and whole ones, of one piece for each block, of pieces far
/// below a page, and of one that fills its pages.
const GRIDS: [(usize, usize, usize, usize, usize); 6] = [
    (3, 4, 18_432, 24_576, 0),
    (3, 4, 4096, 8192, 0),
    (5, 1, 20_480, 20_480, 0),
    (4, 60, 80, 96, 0),
    (2, 3, 5008, 5024, 160),
    (2, 3, 48, 64, 4080),
];

#[test]
fn a_grid_of_pieces_is_gathered_and_scattered_as_its_list_is() {
    type Gather = unsafe extern "C" fn(u32, *const PieceGrid, u64, u64, *mut u64, u64);
    type Scatter = unsafe extern "C" fn(u32, *const PieceGrid, u64, u64, *const u64, *mut u64);
    let Some(library) = compile() else { return };
    // SAFETY: the functions' types are those of MAIN.
    let gather = unsafe { library.get::<Gather>(b"run_gather_grid") }.unwrap();
    // SAFETY: as above.
    let scatter = unsafe { library.get::<Scatter>(b"run_scatter_grid") }.unwrap();
    for (rows, columns, bytes, stride, skipped) in GRIDS {
        let name = format!("{rows} x {columns} of {bytes}, {skipped} skipped");
        let extent = (columns * stride).next_multiple_of(PAGE_BYTES);
        let count = (skipped + rows * columns * bytes).div_ceil(PAGE_BYTES);
        let noise = pattern(rows * extent + count * PAGE_BYTES);
        let (of_memory, of_image) = noise.split_at(rows * extent);
        let filled = |bytes: &[u8]| {
            let mut pages = pages_of(bytes.len() / PAGE_BYTES, 0);
            // SAFETY: as long as the pages.
            unsafe {
                pages
                    .as_mut_ptr()
                    .cast::<u8>()
                    .copy_from(bytes.as_ptr(), bytes.len())
            };
            pages
        };
        let grid_in = |memory: &[Page]| {
            // Rows in an order of their own.
            let starts = (0..rows)
                .rev()
                .map(|row| address(memory) + (row * extent) as u64);
            let starts: Vec<u64> = starts.collect();
            PieceGrid::new(&starts, columns, stride as u64, bytes, skipped).unwrap()
        };
        let pages_at = |image: &[Page], hashes: &[u64]| Pages {
            address: address(image),
            count,
            hashes: hashes.as_ptr().expose_provenance() as u64,
        };
        if skipped == 0 {
            let memory = filled(of_memory);
            let gathered = |by: &dyn Fn(&PieceGrid, Pages)| {
                let (image, hashes) = (pages_of(count, 0x5A), vec![7_u64; count + 5]);
                by(&grid_in(&memory), pages_at(&image, &hashes));
                (bytes_of(&image).to_vec(), hashes)
            };
            let expected = gathered(&|grid, pages| {
                let list = reference::gather_copies(grid, pages);
                // SAFETY: the pieces lie in `memory` and fill the pages.
                unsafe { reference::gather_hashed(&list, pages, count + 5) };
            });
            for blocks in [1, 3, 9] {
                let found = gathered(&|grid, pages| {
                    let hashes = std::ptr::with_exposed_provenance_mut(pages.hashes as usize);
                    let (image, all, entries) = (pages.address, count as u64, count as u64 + 5);
                    // SAFETY: as above.
                    unsafe { gather(blocks, grid, image, all, hashes, entries) };
                });
                assert!(found == expected, "{name}, {blocks} blocks");
            }
        }
        let image = filled(of_image);
        let good = of_image.chunks(PAGE_BYTES).map(XxHash3_64::oneshot);
        let good: Vec<u64> = good.collect();
        for bad in [vec![], vec![0], vec![count - 1, count / 2]] {
            let mut hashes = good.clone();
            for page in &bad {
                hashes[*page] = !good[*page];
            }
            let scattered = |by: &dyn Fn(&PieceGrid, Pages) -> Option<u64>| {
                let memory = pages_of(rows * extent / PAGE_BYTES, 0xEE);
                let first = by(&grid_in(&memory), pages_at(&image, &hashes));
                (bytes_of(&memory).to_vec(), first)
            };
            let expected = scattered(&|grid, pages| {
                let list = grid.copies(pages.address, false);
                // SAFETY: the pieces lie in the pages and in `memory`.
                unsafe { reference::scatter_verified(&list, pages) }
            });
            assert_eq!(expected.1, bad.iter().min().map(|page| *page as u64));
            for blocks in [1, 3, 9] {
                let found = scattered(&|grid, pages| {
                    let hashes = std::ptr::with_exposed_provenance(pages.hashes as usize);
                    let mut found = u64::MAX;
                    let (image, all) = (pages.address, count as u64);
                    // SAFETY: as above.
                    unsafe { scatter(blocks, grid, image, all, hashes, &raw mut found) };
                    (found != u64::MAX).then_some(found)
                });
                assert!(found == expected, "{name}, bad {bad:?}, {blocks} blocks");
            }
        }
    }
}
