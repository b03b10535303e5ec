//! What a device must show before KV cache goes through it: the bytes that were sent.
#![expect(
    unsafe_code,
    reason = "copies between memory of its own, on the GPU and on the host"
)]

use kvrail_cuda::{
    Context, CopyDescriptor, DeviceMemory, Error as CudaError, HashDescriptor, Kernels, Pages,
    PieceGrid, Priority, Stream,
};

use super::CopyMethod;
use crate::chunk::{PAGE_BYTES, hash_pages};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{HostArena, StagingPool};

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

/// Sources of pieces of whole 16 bytes, which end anywhere in a page: (source, bytes). They fill
/// pages one behind the other, with zeros up to the last page's end.
const ALIGNED_PIECES: [(usize, usize); 6] = [
    (65_536, 40_000),
    (16, 4_080),
    (110_000, 4_096),
    (120_000, 16),
    (8_192, 53_248),
    (0, 8_000),
];
/// Where the pieces begin that are scattered, in the first page.
const SCATTERED_FROM: usize = 48;
/// The page whose expected hash is wrong when pages are scattered.
const BAD_PAGE: usize = 7;
/// Entries of the page table, a few of them behind the last page.
const ENTRIES: usize = PAGES + 3;

/// Rows of a grid of pieces, pieces of a row, bytes of a piece and bytes between two of a row; they
/// end anywhere in a page, and the last page has zeros behind them.
const GRID: (usize, usize, usize, usize) = (5, 4, 5_008, 6_000);
/// Pages whose expected hashes are wrong when the grid's are scattered: the first one is reported.
const BAD_GRID_PAGES: [usize; 3] = [19, 11, 23];

/// Checks the kernels against the CPU.
pub(super) fn check_kernels(context: &Context, kernels: &Kernels) -> Result<()> {
    check_apart(context, kernels)?;
    check_together(context, kernels)?;
    check_grid(context, kernels)
}

/// Checks the kernels that take a grid of pieces, and that a kernel reaches pinned memory.
fn check_grid(context: &Context, kernels: &Kernels) -> Result<()> {
    let (rows, columns, bytes, stride) = GRID;
    let bench = Bench::new(context)?;
    let first = |row: usize| (rows - 1 - row) * columns * stride;
    let starts: Vec<u64> = (0..rows)
        .map(|row| bench.source.address() + first(row) as u64)
        .collect();
    let grid = PieceGrid::new(&starts, columns, stride as u64, bytes, 0);
    let grid = grid.ok_or_else(|| Error::new(ErrorKind::Gpu, "no grid of pieces"))?;
    // Where each piece begins in the source, in the order of the pages.
    let places: Vec<usize> = (0..rows)
        .flat_map(|row| (0..columns).map(move |column| first(row) + column * stride))
        .collect();
    let part = |bytes_at: &[u8], place: usize| {
        let part = bytes_at.get(place..place + bytes);
        part.unwrap_or_default().to_vec()
    };
    let mut expected: Vec<u8> = places
        .iter()
        .flat_map(|place| part(&bench.pattern, *place))
        .collect();
    let count = expected.len().div_ceil(PAGE_BYTES);
    expected.resize(count * PAGE_BYTES, 0);
    let mut hashes = vec![0; count];
    hash_pages(&expected, &mut hashes);
    let mut table = hashes.clone();
    table.resize(ENTRIES, 0);

    let entries = bench.send(&vec![0xA5; ENTRIES * 8])?;
    let pages = Pages {
        address: bench.target.address(),
        count,
        hashes: entries.address(),
    };
    let stream = &bench.stream;
    // SAFETY: the pieces lie in the source, the pages in the target; there is room for the entries.
    unsafe { kernels.gather_grid(stream, &grid, pages, ENTRIES) }.map_err(failed)?;
    let found = bench.fetch(&bench.target)?;
    let same = found.get(..expected.len()) == Some(&expected[..]);
    differ(same, "a grid of pieces gathered and hashed by the GPU")?;
    let found = bench.fetch(&entries)?;
    differ(
        found == bytes_of(&table),
        "hashes of the GPU beside a grid of pieces",
    )?;

    bench.send_to(&bench.source, &vec![0; BYTES])?;
    let mut scattered = vec![0; BYTES];
    for page in BAD_GRID_PAGES {
        if let Some(hash) = table.get_mut(page) {
            *hash ^= 1 << 40;
        }
    }
    bench.send_to(&entries, &bytes_of(&table))?;
    for (number, place) in places.iter().enumerate() {
        for at in 0..bytes {
            let from = number * bytes + at;
            if BAD_GRID_PAGES.contains(&(from / PAGE_BYTES)) {
                continue;
            }
            if let (Some(to), Some(byte)) = (scattered.get_mut(place + at), expected.get(from)) {
                *to = *byte;
            }
        }
    }
    let pinned = HostArena::pinned(PAGE_BYTES, context)?;
    let pool = StagingPool::over(pinned, PAGE_BYTES)?;
    let word = pool.try_take(0).and_then(|mut word| {
        word.as_mut_slice().fill(0xFF);
        Some((word.device_address()?, word))
    });
    let (bad, word) = word.ok_or_else(|| Error::new(ErrorKind::Gpu, "no pinned memory"))?;
    // SAFETY: as above; the word is pinned, and longer than the kernel needs.
    unsafe { kernels.scatter_grid(stream, &grid, pages, bad) }.map_err(failed)?;
    let found = bench.fetch(&bench.source)?;
    differ(
        found == scattered,
        "a grid of pieces verified and scattered by the GPU",
    )?;
    let first = BAD_GRID_PAGES.iter().min().map(|page| *page as u64);
    let found = word
        .as_slice()
        .first_chunk()
        .map(|page| u64::from_ne_bytes(*page));
    differ(
        found == first,
        "number of a bad page that the GPU writes to pinned memory",
    )
}

/// Checks the kernels that hash as they copy.
fn check_together(context: &Context, kernels: &Kernels) -> Result<()> {
    let bench = Bench::new(context)?;
    let mut expected = Vec::with_capacity(BYTES);
    let mut pieces = Vec::new();
    for (from, bytes) in ALIGNED_PIECES {
        pieces.push([
            bench.source.address() + from as u64,
            expected.len() as u64,
            bytes as u64,
        ]);
        expected.extend_from_slice(bench.pattern.get(from..from + bytes).unwrap_or_default());
    }
    let filled = expected.len();
    pieces.push([0, filled as u64, (BYTES - filled) as u64]);
    expected.resize(BYTES, 0);
    let mut hashes = vec![0; PAGES];
    hash_pages(&expected, &mut hashes);
    let mut table: Vec<u64> = hashes.clone();
    table.resize(ENTRIES, 0);

    let image = bench.target.address();
    let gathers: Vec<u64> = pieces
        .iter()
        .flat_map(|[source, at, bytes]| [*source, image + at, *bytes])
        .collect();
    let gathers = bench.send(&bytes_of(&gathers))?;
    let entries = bench.send(&vec![0xA5; ENTRIES * 8])?;
    let pages = Pages {
        address: image,
        count: PAGES,
        hashes: entries.address(),
    };
    let (stream, count) = (&bench.stream, pieces.len());
    // SAFETY: the pieces lie in the source and fill the target; there is room for the entries.
    unsafe { kernels.gather_hashed(stream, gathers.address(), count, pages, ENTRIES) }
        .map_err(failed)?;
    let found = bench.fetch(&bench.target)?;
    differ(found == expected, "pieces gathered and hashed by the GPU")?;
    let found = bench.fetch(&entries)?;
    differ(
        found == bytes_of(&table),
        "hashes of the GPU beside pieces that it gathers",
    )?;

    // Back, to where they came from, which is something else by now; but for one bad page.
    let wanted = SCATTERED_FROM..filled;
    let blank = vec![0; BYTES];
    bench.send_to(&bench.source, &blank)?;
    if let Some(hash) = table.get_mut(BAD_PAGE) {
        *hash ^= 1 << 40;
    }
    bench.send_to(&entries, &bytes_of(&table))?;
    let mut scattered = blank;
    let mut words = Vec::new();
    for [target, at, bytes] in pieces.iter().take(ALIGNED_PIECES.len()) {
        let (start, end) = (*at as usize, (at + bytes) as usize);
        let from = start.max(wanted.start);
        words.extend([
            image + from as u64,
            target + (from - start) as u64,
            (end - from) as u64,
        ]);
        let base = (target - bench.source.address()) as usize;
        for at in (from..end).filter(|at| at / PAGE_BYTES != BAD_PAGE) {
            if let (Some(to), Some(byte)) = (scattered.get_mut(base + at - start), expected.get(at))
            {
                *to = *byte;
            }
        }
    }
    words.push(u64::MAX);
    let count = ALIGNED_PIECES.len();
    let scatters = bench.send(&bytes_of(&words))?;
    let bad = scatters.address() + (count * size_of::<CopyDescriptor>()) as u64;
    // SAFETY: the pieces lie in the pages, without gaps, and their targets in the source; the word
    // behind them is theirs.
    unsafe { kernels.scatter_verified(stream, scatters.address(), count, pages, bad) }
        .map_err(failed)?;
    let found = bench.fetch(&bench.source)?;
    differ(
        found == scattered,
        "pieces verified and scattered by the GPU",
    )?;
    let found = bench.fetch(&scatters)?;
    let page = found.get(count * size_of::<CopyDescriptor>()..);
    differ(
        page == Some(&(BAD_PAGE as u64).to_ne_bytes()),
        "number of a bad page found by the GPU",
    )
}

/// Checks the kernels that copy or hash.
fn check_apart(context: &Context, kernels: &Kernels) -> Result<()> {
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

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
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
