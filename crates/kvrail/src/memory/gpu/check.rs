//! What a device must show before KV cache goes through it: the bytes that were sent.
#![expect(
    unsafe_code,
    reason = "copies between memory of its own, on the GPU and on the host"
)]

use kvrail_cuda::{Context, DeviceMemory, HashDescriptor, Kernels, Priority, Stream};
use kvrail_cuda::{CopyDescriptor, Error as CudaError};

use super::CopyMethod;
use crate::chunk::{PAGE_BYTES, hash_pages};
use crate::error::{Error, ErrorKind, Result};

/// Pages of the pattern.
const PAGES: usize = 33;
const BYTES: usize = PAGES * PAGE_BYTES;
/// Pieces that cut the pattern at all alignments: (source, target, bytes), in bytes.
const PIECES: [(usize, usize, usize); 7] = [
    (0, 0, 65_536),
    (65_536, 65_536, 16),
    (65_552, 65_553, 4_095),
    (70_001, 70_002, 1),
    (70_004, 70_004, 40_000),
    (110_008, 110_016, 20_008),
    (130_021, 130_031, 3),
];

/// Checks both kernels against the CPU.
pub(super) fn check_kernels(context: &Context, kernels: &Kernels) -> Result<()> {
    let bench = Bench::new(context)?;
    let (source, target) = (bench.source.address(), bench.target.address());
    let copies = PIECES.map(|(from, to, bytes)| CopyDescriptor {
        source: source + from as u64,
        target: target + to as u64,
        bytes: bytes as u64,
    });
    let words: Vec<u8> = copies
        .iter()
        .flat_map(|copy| [copy.source, copy.target, copy.bytes])
        .chain({
            let hash = HashDescriptor {
                source,
                first_page: 0,
                pages: PAGES as u64,
            };
            [hash.source, hash.first_page, hash.pages]
        })
        .flat_map(u64::to_ne_bytes)
        .collect();
    let descriptors = bench.send(&words)?;
    let hashes = context.allocate(PAGES * 8).map_err(failed)?;
    let hash_descriptor =
        descriptors.address() + (words.len() - size_of::<HashDescriptor>()) as u64;
    // SAFETY: the pieces lie inside source and target, both BYTES long, and overlap nowhere.
    unsafe { kernels.copy(&bench.stream, descriptors.address(), PIECES.len()) }.map_err(failed)?;
    // SAFETY: the source has PAGES pages, `hashes` room for as many.
    let launched =
        unsafe { kernels.hash_pages(&bench.stream, hash_descriptor, 1, PAGES, hashes.address()) };
    launched.map_err(failed)?;
    bench.compare()?;
    let found = bench.fetch(&hashes)?;
    let mut expected = vec![0; PAGES];
    hash_pages(&bench.pattern, &mut expected);
    let expected: Vec<u8> = expected.into_iter().flat_map(u64::to_le_bytes).collect();
    differ(found == expected, "page hashes of the GPU")
}

/// Checks one of the driver's own ways to copy pieces.
pub(super) fn check_copies(context: &Context, method: CopyMethod) -> Result<()> {
    let bench = Bench::new(context)?;
    let (source, target) = (bench.source.address(), bench.target.address());
    if method == CopyMethod::Batch {
        let targets = PIECES.map(|(_, to, _)| target + to as u64);
        let sources = PIECES.map(|(from, _, _)| source + from as u64);
        let bytes = PIECES.map(|(_, _, bytes)| bytes);
        // SAFETY: as in `check_kernels`.
        let copied = unsafe { bench.stream.copy_batch(&targets, &sources, &bytes) };
        copied.map_err(failed)?;
        return bench.compare();
    }
    for (from, to, bytes) in PIECES {
        // SAFETY: as in `check_kernels`.
        let copied = unsafe {
            bench
                .stream
                .copy_on_device(target + to as u64, source + from as u64, bytes)
        };
        copied.map_err(failed)?;
    }
    bench.compare()
}

/// A pattern on the device, and room for its copy.
struct Bench<'a> {
    context: &'a Context,
    stream: Stream,
    pattern: Vec<u8>,
    source: DeviceMemory,
    target: DeviceMemory,
}

impl<'a> Bench<'a> {
    fn new(context: &'a Context) -> Result<Self> {
        // A multiplicative hash of the index: no two pages and no two alignments look alike.
        let pattern: Vec<u8> = (0..BYTES as u64)
            .map(|index| (index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
            .collect();
        let bench = Self {
            context,
            stream: context.stream(Priority::High).map_err(failed)?,
            source: context.allocate(BYTES).map_err(failed)?,
            target: context.allocate(BYTES).map_err(failed)?,
            pattern,
        };
        bench.send_to(&bench.source, &bench.pattern)?;
        bench.send_to(&bench.target, &vec![0; BYTES])?;
        Ok(bench)
    }

    /// Compares the target with what the pieces should have brought there.
    fn compare(&self) -> Result<()> {
        let mut expected = vec![0; BYTES];
        for (from, to, bytes) in PIECES {
            if let (Some(target), Some(source)) = (
                expected.get_mut(to..to + bytes),
                self.pattern.get(from..from + bytes),
            ) {
                target.copy_from_slice(source);
            }
        }
        let found = self.fetch(&self.target)?;
        differ(found == expected, "pieces copied by the GPU")
    }

    fn send(&self, bytes: &[u8]) -> Result<DeviceMemory> {
        let memory = self.context.allocate(bytes.len()).map_err(failed)?;
        self.send_to(&memory, bytes)?;
        Ok(memory)
    }

    fn send_to(&self, memory: &DeviceMemory, bytes: &[u8]) -> Result<()> {
        // SAFETY: `memory` is at least as long, and both stay until the stream was waited for.
        unsafe {
            self.stream
                .copy_to_device(memory.address(), bytes.as_ptr(), bytes.len())
        }
        .and_then(|()| self.stream.synchronize())
        .map_err(failed)
    }

    fn fetch(&self, memory: &DeviceMemory) -> Result<Vec<u8>> {
        let mut bytes = vec![0; memory.bytes()];
        // SAFETY: as in `send_to`.
        unsafe {
            self.stream
                .copy_to_host(bytes.as_mut_ptr(), memory.address(), bytes.len())
        }
        .and_then(|()| self.stream.synchronize())
        .map_err(failed)?;
        Ok(bytes)
    }
}

fn failed(error: CudaError) -> Error {
    Error::gpu("check of the GPU", error)
}

fn differ(same: bool, what: &str) -> Result<()> {
    match same {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Gpu,
            format!("{what} differ from the CPU's"),
        )),
    }
}
