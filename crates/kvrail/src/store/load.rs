//! One chunk from its file into the KV cache: read, verify, scatter.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail_cuda::Event;

use super::batch::{Ending, Member};
use super::directory::Location;
use super::image::{self, Extents, READ_REQUEST_BYTES};
use super::kv_cache::CacheShared;
use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::is_missing;
use super::quarantine::{SetAside, set_aside};
use super::queue::TransferQueue;
use super::shared::StoreShared;
use super::ticket::LoadReport;
use crate::chunk::ChunkRef;
use crate::chunk::{ChunkHead, PAGE_BYTES, PageTable, hash_pages, root_checksum};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{FileStatus, IoFile, OpenMode, Operation};
use crate::layout::TransferPlan;
use crate::memory::{StagingRange, scatter};

/// How long a worker waits for a staging buffer before it looks for other work.
const BUFFER_PATIENCE: Duration = Duration::from_millis(20);

/// One chunk to load.
#[derive(Debug)]
pub(super) struct LoadJob {
    pub(super) cache: Arc<CacheShared>,
    pub(super) chunk: ChunkRef,
    /// Payload bytes that are wanted.
    pub(super) payload: Range<usize>,
    /// Where they go. Planned when the load runs: a waiting plan of many layers is large.
    pub(super) blocks: Vec<usize>,
    /// On a GPU: what the blocks may be written after.
    pub(super) after: Option<Arc<Event>>,
    pub(super) member: Member<LoadReport>,
    /// When the work on it began; the wait limit counts from here.
    pub(super) started: Option<Instant>,
}

impl LoadJob {
    /// Takes a staging buffer if one is free.
    pub(super) fn try_take_buffer(&self) -> Option<StagingRange> {
        self.cache.pool.try_take(0)
    }
}

/// Runs a load to its end, or puts it back when no staging buffer comes free.
pub(super) fn run(
    store: &StoreShared,
    queue: &TransferQueue,
    mut job: Box<LoadJob>,
    buffer: Option<StagingRange>,
) {
    let started = *job.started.get_or_insert_with(Instant::now);
    let deadline = started + store.wait_limit;
    let buffer = match buffer {
        Some(buffer) => Ok(buffer),
        None => job
            .cache
            .pool
            .take(deadline.min(Instant::now() + BUFFER_PATIENCE)),
    };
    let result = match buffer {
        Err(_) if Instant::now() < deadline => return queue.give_back(job),
        Err(error) => Err(error),
        Ok(buffer) => load_chunk(store, &job, buffer, deadline),
    };
    let ending = match result {
        Ok(()) => {
            store.metrics.chunks_loaded.add(1);
            store.metrics.bytes_loaded.add(job.payload.len() as u64);
            store.metrics.load_seconds.add_duration(started.elapsed());
            store.present.insert(job.cache.place(&job.chunk.key));
            Ending::Loaded
        }
        Err(error) => {
            store.metrics.loads_failed.add(1);
            store.present.remove(&job.cache.place(&job.chunk.key));
            Ending::Failed(error.to_string())
        }
    };
    queue.load_ended();
    job.member.end(ending);
}

/// Loads one chunk. Whatever is wrong with the file, it is counted, and set aside if it is damaged.
fn load_chunk(
    store: &StoreShared,
    job: &LoadJob,
    buffer: StagingRange,
    deadline: Instant,
) -> Result<()> {
    let mount = store.mount(job.cache.rank, &job.chunk.key);
    let place = job.cache.place(&job.chunk.key);
    let mut status = None;
    let result =
        open_chunk(mount, &place, job.cache.format.file_bytes()).and_then(|(file, found)| {
            status = Some(found);
            if store.bad.holds(&place, || Some(found)) {
                let known = Error::new(ErrorKind::Damaged, "found bad before, not read again");
                return Err(known.with_path(file.path()));
            }
            let read = read(store, job, &file, buffer, deadline)?;
            let loaded = match &job.cache.gpu {
                None => read.finish(job),
                Some(gpu) => {
                    gpu.finish_load(job, read.image, &read.extents, &read.computed, deadline)
                }
            };
            loaded.map_err(|error| error.with_path(file.path()))
        });
    let Err(error) = result else { return Ok(()) };
    if is_missing(&error) {
        store.metrics.chunks_missing.add(1);
    } else if error.kind() == ErrorKind::Damaged {
        store.metrics.chunks_damaged.add(1);
        store.notices.warn(Topic::ChunkDamaged, || {
            format!("bad chunk, not used: {error}")
        });
        set_bad_chunk_aside(store, mount, place, status, &error);
    } else {
        store.notices.warn(Topic::LoadFailed, || {
            format!("load failed, recomputed: {error}")
        });
    }
    Err(error)
}

/// Opens a chunk file and checks that it is a regular file of the right length.
fn open_chunk(
    mount: &Mount,
    place: &Place,
    file_bytes: usize,
) -> Result<(Arc<IoFile>, FileStatus)> {
    let (group, rank, key) = place;
    let below = Location::chunk(*group, *rank, key).below();
    let opened = mount.directory.open().and_then(|namespace| {
        IoFile::open_in(&namespace, below, OpenMode::Read, mount.report.direct)
    });
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            // What no process of ours leaves at a chunk's name: a symbolic link, a directory, a
            // socket, a file that its owner cannot read.
            let foreign = [
                rustix::io::Errno::LOOP,
                rustix::io::Errno::ISDIR,
                rustix::io::Errno::NOTDIR,
                rustix::io::Errno::ACCESS,
                rustix::io::Errno::INVAL,
                rustix::io::Errno::NXIO,
            ]
            .map(|errno| Some(errno.raw_os_error()))
            .contains(&error.os_error().and_then(std::io::Error::raw_os_error));
            if !foreign {
                return Err(error);
            }
            return Err(Error::new(ErrorKind::Damaged, "no readable chunk file").with_source(error));
        }
    };
    let status = file.status()?;
    let damaged =
        |message: String| Err(Error::new(ErrorKind::Damaged, message).with_path(file.path()));
    if !status.is_file {
        return damaged("not a regular file".into());
    }
    if status.bytes != file_bytes as u64 {
        let bytes = status.bytes;
        return damaged(format!("expected {file_bytes} bytes, the file has {bytes}"));
    }
    Ok((Arc::new(file), status))
}

/// What was read of a chunk file, one part behind the other: head, pages, page table.
struct Read {
    image: StagingRange,
    extents: Extents,
    /// Hashes of the pages; none where the GPU makes them.
    computed: Vec<u64>,
}

impl Read {
    /// Verifies what was read and copies it to its blocks in host memory.
    fn finish(self, job: &LoadJob) -> Result<()> {
        verify(job, self.image.as_slice(), &self.extents, &self.computed)?;
        let start = PAGE_BYTES + job.payload.start - self.extents.pages.start * PAGE_BYTES;
        let payload = image::bytes(self.image.as_slice(), start..start + job.payload.len())?;
        let plan = TransferPlan::new(&job.cache.layout, &job.blocks)?;
        scatter(&plan, &job.cache.regions, payload)
    }
}

/// Reads what the job needs; the CPU hashes pages while later ones are read, unless a GPU does.
fn read(
    store: &StoreShared,
    job: &LoadJob,
    file: &Arc<IoFile>,
    buffer: StagingRange,
    deadline: Instant,
) -> Result<Read> {
    let format = &job.cache.format;
    let extents = Extents::new(format, &job.payload);
    let pages_start = format.payload_offset() + extents.pages.start * PAGE_BYTES;
    let hash_here = job.cache.gpu.as_ref().is_none_or(|gpu| !gpu.hashes());
    let mut computed = vec![0_u64; if hash_here { extents.pages.len() } else { 0 }];
    let mut image: Option<StagingRange> = None;
    let mut buffer = buffer;
    let mut parts = Vec::new();
    for range in &extents.ranges {
        let target = buffer.split_to(range.len());
        parts.extend(image::submit(
            &*store.engine,
            Operation::Read,
            file,
            range.start,
            target,
            READ_REQUEST_BYTES,
        ));
    }
    for part in parts {
        let offset = part.offset;
        let bytes = part.wait(deadline)?;
        hash_part(bytes.as_slice(), offset, pages_start, &mut computed);
        match &mut image {
            None => image = Some(bytes),
            Some(image) => image.rejoin(bytes).map_err(|_| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    "I/O engine gave back another buffer",
                )
            })?,
        }
    }
    let image = image.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "empty chunk"))?;
    Ok(Read {
        image,
        extents,
        computed,
    })
}

/// Hashes the payload pages of a part that starts at `offset` of the file.
fn hash_part(bytes: &[u8], offset: usize, pages_start: usize, computed: &mut [u64]) {
    let skipped = pages_start.saturating_sub(offset);
    let first = offset.saturating_sub(pages_start) / PAGE_BYTES;
    if let (Some(pages), Some(hashes)) = (bytes.get(skipped..), computed.get_mut(first..)) {
        hash_pages(pages, hashes);
    }
}

/// Checks head, page table and pages of an image against each other and against the job.
pub(super) fn verify(
    job: &LoadJob,
    image: &[u8],
    extents: &Extents,
    computed: &[u64],
) -> Result<()> {
    let damaged = |message: String| Err(Error::new(ErrorKind::Damaged, message));
    let format = &job.cache.format;
    let head = image::bytes(image, 0..PAGE_BYTES)?;
    let root = ChunkHead::check(head, &job.cache.head_fields(job.chunk), format)?;
    let table_start = PAGE_BYTES + extents.pages.len() * PAGE_BYTES;
    let table = image::bytes(image, table_start..table_start + format.table_bytes())?;
    if root_checksum(table) != root {
        return damaged("page table does not match the root checksum".into());
    }
    let Some(table) = PageTable::decode(format, table) else {
        return damaged("page table has entries behind the last page".into());
    };
    let expected = table.pages(extents.pages.clone());
    if expected == computed {
        return Ok(());
    }
    let bad = expected
        .iter()
        .zip(computed)
        .position(|(expected, found)| expected != found);
    let page = bad.map_or(extents.pages.end, |index| extents.pages.start + index);
    damaged(format!(
        "page {page} of {} does not match its checksum",
        format.page_count()
    ))
}

/// Puts a bad chunk out of the way; one that must stay is remembered, so that it is not read again.
fn set_bad_chunk_aside(
    store: &StoreShared,
    mount: &Mount,
    place: Place,
    status: Option<FileStatus>,
    reason: &Error,
) {
    let remember = || {
        if let Some(status) = status {
            store.bad.insert(place, status);
        }
    };
    if !store.may_write {
        return remember();
    }
    let inode = status.map(|status| status.inode);
    match set_aside(&mount.directory, &place, inode, &reason.to_string()) {
        Ok(SetAside::Kept) => store.metrics.chunks_set_aside.add(1),
        Ok(SetAside::Removed) => store.metrics.bad_chunks_removed.add(1),
        Ok(SetAside::NotThere) => {}
        Err(error) => {
            remember();
            store.notices.warn(Topic::SetAsideFailed, || {
                format!("a bad chunk stays where it is and is not read again: {error}")
            });
        }
    }
}
