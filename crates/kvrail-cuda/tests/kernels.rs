//! The kernels' source, run on the CPU behind a shim, against their reference and against XXH3.
#![expect(unsafe_code, reason = "calls compiled kernels on memory of the test")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::path::Path;
use std::process::Command;

use kvrail_cuda::{CopyDescriptor, HashDescriptor, PAGE_BYTES, reference};
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
    let bytes = pattern(41 * PAGE_BYTES + 8);
    let base = bytes.as_ptr().expose_provenance().next_multiple_of(8);
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
