//! A chunk put together from files of other ranges of heads.
//!
//! Each file is verified page by page, as any, and the bytes of the heads that are wanted are copied
//! out of it. What comes of that is the image of the file that this rank would have stored, so from
//! there on it is a chunk like one of the DRAM tier: verified whole, copied to its blocks by the
//! CPU or a GPU, and kept in memory if there is room.
//!
//! Files are read through windows of their own, since those of larger ranges are larger than a
//! staging buffer. What lies between the wanted heads is passed over where it is long.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::chunk_file::{check_chunk, note_failure, open_chunk};
use super::image;
use super::load::Outcome;
use super::load_host::given_up;
use super::load_job::{LoadBuffer, LoadJob};
use super::mount::Mount;
use super::notice::Topic;
use super::save::complete_image;
use super::shared::StoreShared;
use super::splits;
use super::tier;
use super::verify::{verify_frame_of, verify_pages};
use crate::chunk::{ChunkFormat, HeadRange, PAGE_BYTES, PageTable, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoFile, Operation};
use crate::layout::HeadPiece;
use crate::memory::{StagingPool, StagingRange};
use crate::sync::{Mutex, PoisonError};

/// Bytes that are read of a file at a time: the engines' request.
const WINDOW_BYTES: usize = 4 << 20;
/// Windows of a store, one for each load that is put together at the same time.
const WINDOWS: usize = 4;
/// Pages between wanted ones that are read with them, 64 KiB: a choice that was not measured, between
/// many small requests and bytes that nobody wants.
const GAP_PAGES: usize = 16;

/// The memory that files of other ranges are read to, made when the first is.
#[derive(Debug, Default)]
pub(super) struct Windows(Mutex<Option<StagingPool>>);

impl Windows {
    fn take(&self, deadline: Instant) -> Result<StagingRange> {
        let pool = {
            let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match pool.as_ref() {
                Some(pool) => pool.clone(),
                None => {
                    let made = StagingPool::new(WINDOWS * WINDOW_BYTES, WINDOW_BYTES)?;
                    pool.insert(made).clone()
                }
            }
        };
        pool.take(deadline)
    }
}

/// Finds the files that the job's part can be put together from, `None` where there are none.
pub(super) fn sources(store: &StoreShared, job: &LoadJob) -> Option<Vec<Part>> {
    let place = job.cache.place(&job.chunk.key);
    let found = splits::find(store, &place, &job.watched, |(group, part, key)| {
        let below = super::directory::Location::chunk(*group, *part, key).below();
        let mount = store.mount(*part, key);
        if mount.health.is_out() {
            return Ok(false);
        }
        let namespace = mount.directory.open()?;
        let status = namespace.status(below)?;
        Ok(status.is_some() && !store.bad.holds(&(*group, *part, *key), || status))
    });
    found.unwrap_or_else(|error| {
        store.notices.warn(Topic::LoadFailed, || {
            format!("other ranges of heads cannot be looked for: {error}")
        });
        None
    })
}

/// Loads a chunk from the files of `parts`, which are in the order of their heads. One that is
/// missing or damaged makes the chunk a miss.
pub(super) fn load(
    store: &StoreShared,
    job: &LoadJob,
    parts: &[Part],
    buffer: LoadBuffer,
    deadline: Instant,
) -> Outcome {
    let LoadBuffer::Host(mut buffer) = buffer else {
        return Outcome::Again(None);
    };
    let mut image = buffer.split_to(job.cache.format.file_bytes());
    let loaded = assemble(store, job, parts, image.as_mut_slice(), deadline)
        .and_then(|()| deliver(store, job, Arc::new(image), deadline));
    match loaded {
        Ok(image) => {
            store.metrics.chunks_assembled.add(1);
            Outcome::Loaded(image)
        }
        Err(error) => Outcome::Failed(error),
    }
}

/// Fills the image of the file that the job's own part would have.
fn assemble(
    store: &StoreShared,
    job: &LoadJob,
    parts: &[Part],
    image: &mut [u8],
    deadline: Instant,
) -> Result<()> {
    let cache = &*job.cache;
    let (Some(head_bytes), Some(ours)) = (&cache.heads, cache.part.heads()) else {
        return Err(no_heads());
    };
    let (format, blocks) = (&cache.format, cache.blocks_per_chunk);
    let payload = format.payload_offset()..format.payload_offset() + format.payload_bytes();
    let target = image::bytes_mut(image, payload.clone())?;
    let mut at = ours.first();
    for part in parts {
        let heads = part.heads().ok_or_else(no_heads)?;
        let wanted = at..heads.end().min(ours.end());
        at = wanted.end;
        let piecewise = Pieces {
            block: head_bytes.pieces(&range(heads), &range(ours), &wanted),
            blocks,
            source_bytes: head_bytes.block_bytes(heads.count()),
            target_bytes: format.block_bytes(),
        };
        let format = ChunkFormat::new(head_bytes.payload_shape(blocks, heads.count()))?;
        take_part(store, job, *part, &format, &piecewise, target, deadline)?;
    }
    if at != ours.end() {
        return Err(no_heads());
    }
    image::bytes_mut(image, payload.end..payload.end + format.pad_bytes())?.fill(0);
    complete_image(cache, job.chunk, image, false)
}

/// Brings an image to the job's blocks, verified like one of the DRAM tier, which gets it then.
/// Returns it where it is still to be copied there.
fn deliver(
    store: &StoreShared,
    job: &LoadJob,
    image: Arc<StagingRange>,
    deadline: Instant,
) -> Result<Option<Arc<StagingRange>>> {
    if !job.watched.claim() {
        return Err(given_up());
    }
    let delivered = match &job.cache.gpu {
        None => tier::copy_out(job, image.as_slice()),
        Some(gpu) => gpu.load_image(job, &image, deadline),
    };
    job.watched.release();
    delivered?;
    Ok(store.tier.insert(job.cache.place(&job.chunk.key), image))
}

/// Copies what one file has to offer into the payload, and takes note of how that went.
fn take_part(
    store: &StoreShared,
    job: &LoadJob,
    part: Part,
    format: &ChunkFormat,
    pieces: &Pieces,
    target: &mut [u8],
    deadline: Instant,
) -> Result<()> {
    let key = &job.chunk.key;
    let place = (job.cache.group, part, *key);
    let mount = store.mount(part, key);
    job.watched.is_at(store.mount_index(part, key));
    if let Err(error) = mount.health.check(&mount.root) {
        store.metrics.loads_refused_path_out.add(1);
        return Err(error);
    }
    let began = Instant::now();
    let mut status = None;
    let taken = open_chunk(mount, &place).and_then(|(file, found)| {
        status = Some(found);
        check_chunk(&file, &found, format.file_bytes())?;
        if store.bad.holds(&place, || Some(found)) {
            let known = Error::new(ErrorKind::Damaged, "found bad before, not read again");
            return Err(known.with_path(file.path()));
        }
        let source = Source {
            store,
            mount,
            file: &file,
            format,
            deadline,
        };
        let bytes = source
            .open_table(job, part)
            .and_then(|table| source.copy(&table, pieces, target))
            .map_err(|error| error.with_path(file.path()))?;
        if job.used_at.is_some() {
            job.note_use(part);
        }
        Ok(bytes)
    });
    match taken {
        Ok(bytes) => {
            mount.health.note(&mount.root, began, bytes, None);
            Ok(())
        }
        Err(error) => {
            note_failure(store, mount, place, status, began, &error);
            Err(error)
        }
    }
}

/// A file that is read, and how.
struct Source<'a> {
    store: &'a StoreShared,
    mount: &'a Mount,
    file: &'a Arc<IoFile>,
    format: &'a ChunkFormat,
    deadline: Instant,
}

impl Source<'_> {
    /// Reads ranges of the file, one behind the other.
    fn read(&self, ranges: &[Range<usize>]) -> Result<StagingRange> {
        let bytes = ranges.iter().map(Range::len).sum();
        let mut window = self.store.windows.take(self.deadline)?;
        if bytes > window.len() {
            let message = format!("{bytes} bytes at once: a window has {}", window.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let (window, engine) = (window.split_to(bytes), self.mount.engine.reader());
        let parts = image::submit(&*engine, Operation::Read, self.file, ranges, window);
        let parts = parts.into_iter().map(|part| part.wait(self.deadline));
        image::rejoin(parts.collect())
    }

    /// Reads and verifies head and page table.
    fn open_table(&self, job: &LoadJob, part: Part) -> Result<PageTable> {
        let table = self.format.table_offset()..self.format.file_bytes();
        let read = self.read(&[0..PAGE_BYTES, table])?;
        let (head, table) = read
            .as_slice()
            .split_at_checked(PAGE_BYTES)
            .unwrap_or_default();
        let fields = job.cache.head_fields_of(part, job.chunk);
        verify_frame_of(&fields, self.format, head, table)
    }

    /// Reads and verifies the pages that hold the pieces, and copies these. Returns the bytes read.
    fn copy(&self, table: &PageTable, pieces: &Pieces, target: &mut [u8]) -> Result<usize> {
        let mut left = pieces.all().peekable();
        let mut bytes_read = 0;
        for pages in windows(pieces.all(), WINDOW_BYTES / PAGE_BYTES) {
            let start = self.format.payload_offset() + pages.start * PAGE_BYTES;
            let bytes = start..start + pages.len() * PAGE_BYTES;
            let window = self.read(std::slice::from_ref(&bytes))?;
            verify_pages(self.format, table, pages.start, window.as_slice())?;
            bytes_read += window.len();
            let (from, to) = (pages.start * PAGE_BYTES, pages.end * PAGE_BYTES);
            while let Some(piece) = left.peek() {
                let end = piece.source + piece.bytes;
                let here = piece.source.max(from)..end.min(to);
                if !here.is_empty() {
                    let source = here.start - from..here.end - from;
                    let at = piece.target + (here.start - piece.source);
                    image::bytes_mut(target, at..at + here.len())?
                        .copy_from_slice(image::bytes_of(window.as_slice(), source)?);
                }
                if end > to {
                    break;
                }
                left.next();
            }
        }
        match left.next() {
            None => Ok(bytes_read),
            Some(_) => Err(no_heads()),
        }
    }
}

/// What one payload gives to another: the same pieces of each block.
struct Pieces {
    block: Vec<HeadPiece>,
    blocks: usize,
    /// Bytes of a block in the payload that is read, and in that which is put together.
    source_bytes: usize,
    target_bytes: usize,
}

impl Pieces {
    /// Returns the pieces of all blocks, in payload order.
    fn all(&self) -> impl Iterator<Item = HeadPiece> + '_ {
        (0..self.blocks).flat_map(move |block| {
            self.block.iter().map(move |piece| HeadPiece {
                source: piece.source + block * self.source_bytes,
                target: piece.target + block * self.target_bytes,
                bytes: piece.bytes,
            })
        })
    }
}

/// Returns which pages are read together for the pieces, `most` at a time: those that hold them, and
/// what lies between where that is little.
fn windows(pieces: impl Iterator<Item = HeadPiece>, most: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for piece in pieces {
        let end = (piece.source + piece.bytes).div_ceil(PAGE_BYTES);
        let start = piece.source / PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if start <= run.end + GAP_PAGES => run.end = end.max(run.end),
            _ => runs.push(start..end),
        }
    }
    let parts = |run: Range<usize>| {
        let end = run.end;
        run.step_by(most)
            .map(move |start| start..end.min(start + most))
    };
    runs.into_iter().flat_map(parts).collect()
}

fn range(heads: HeadRange) -> Range<usize> {
    heads.first()..heads.end()
}

fn no_heads() -> Error {
    let message = "files of ranges of heads that do not make up the one that is loaded";
    Error::new(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_hold_every_piece_and_are_bounded(
            gaps in proptest::collection::vec((0_usize..200_000, 1_usize..100_000), 1..20),
            most in 1_usize..40,
        ) {
            let mut at = 0;
            let pieces: Vec<HeadPiece> = gaps
                .iter()
                .map(|&(gap, bytes)| {
                    let source = at + gap;
                    at = source + bytes;
                    HeadPiece { source, target: 0, bytes }
                })
                .collect();
            let found = windows(pieces.iter().copied(), most);
            prop_assert!(found.iter().all(|window| (1..=most).contains(&window.len())));
            prop_assert!(found.windows(2).all(|pair| pair[0].end <= pair[1].start));
            let holds = |page: usize| found.iter().any(|window| window.contains(&page));
            for piece in &pieces {
                let pages = piece.source / PAGE_BYTES..(piece.source + piece.bytes).div_ceil(PAGE_BYTES);
                prop_assert!(pages.clone().all(holds));
            }
            let wanted: usize = pieces.iter().map(|piece| piece.bytes).sum();
            let read: usize = found.iter().map(|window| window.len() * PAGE_BYTES).sum();
            prop_assert!(read <= wanted + pieces.len() * (GAP_PAGES + 2) * PAGE_BYTES);
        }
    }

    #[test]
    fn what_lies_between_is_read_where_it_is_little() {
        let piece = |source: usize| HeadPiece {
            source: source * PAGE_BYTES,
            target: 0,
            bytes: PAGE_BYTES,
        };
        let near = [piece(0), piece(GAP_PAGES + 1)].into_iter();
        assert_eq!(windows(near, 1024), vec![0..GAP_PAGES + 2; 1]);
        let far = [piece(0), piece(GAP_PAGES + 2)].into_iter();
        assert_eq!(windows(far, 1024), [0..1, GAP_PAGES + 2..GAP_PAGES + 3]);
    }
}
