//! One chunk from its file into the KV cache: read, verify, scatter.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::assemble;
use super::batch::Ending;
use super::capacity::{PendingUse, now_on_path};
use super::chunk_file::{check_chunk, note_failure, open_chunk};
use super::gpu::{GpuSide, InPlaceFailure, Route};
use super::health::is_timeout;
use super::image::{self, Extents};
use super::load_host::{self, given_up};
use super::load_job::{LoadBuffer, LoadJob};
use super::load_memory;
use super::load_tokens;
use super::mount::Mount;
use super::notice::Topic;
use super::parked::{self, Parked};
use super::publish::is_missing;
use super::queue::TransferQueue;
use super::shared::StoreShared;
use super::verify::hash_part;
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoFile, Operation};
use crate::memory::StagingRange;

/// How long a worker waits for a staging buffer before it looks for other work.
const BUFFER_PATIENCE: Duration = Duration::from_millis(20);

/// How a load went.
pub(super) enum Outcome {
    /// The image of the whole chunk where it is still to be copied to the tier.
    Loaded(Option<Arc<StagingRange>>),
    /// From host memory: whether its file is still there is not known.
    FromMemory,
    Failed(Error),
    /// Now by POSIX: by cuFile it did not work, or was not tried.
    Again(Option<Error>),
    /// cuFile may still write to the blocks.
    Hangs(Error, Parked),
}

/// Runs a load to its end, or puts it back: when no staging buffer comes free, and when cuFile
/// failed and POSIX shall do it.
pub(super) fn run(
    store: &StoreShared,
    queue: &Arc<TransferQueue>,
    mut job: Box<LoadJob>,
    mut buffer: Option<LoadBuffer>,
) {
    let waited = job.submitted.elapsed();
    let is_too_late = job.started.is_none() && waited >= turn_limit(store);
    let started = *job.started.get_or_insert_with(Instant::now);
    let deadline = started + store.wait_limit;
    let mount = store.mount(job.cache.part, &job.chunk.key);
    if is_too_late {
        return refuse(store, queue, *job, waited);
    }
    if job.route != Route::Posix && !mount.cufile.is_on() {
        job.route = Route::Posix;
        return put_back(queue, job);
    }
    let outcome = match load_memory::load(store, &job, &mut buffer, deadline) {
        Some(Ok(())) => Outcome::FromMemory,
        Some(Err(error)) => Outcome::Failed(error),
        None => {
            let buffer = match buffer {
                Some(buffer) => Ok(buffer),
                None => job.take_buffer(deadline.min(Instant::now() + BUFFER_PATIENCE)),
            };
            match buffer {
                Err(_) if Instant::now() < deadline => return put_back(queue, job),
                Err(error) => Outcome::Failed(error),
                Ok(buffer) => load_chunk(store, mount, &job, buffer, deadline),
            }
        }
    };
    let result = match outcome {
        Outcome::Loaded(image) => Ok((true, image)),
        Outcome::FromMemory => Ok((false, None)),
        Outcome::Failed(error) => Err(error),
        Outcome::Again(error) => {
            job.route = Route::Posix;
            job.cufile_error = error;
            return put_back(queue, job);
        }
        Outcome::Hangs(error, parked) => {
            job.route = Route::Posix;
            store.cufile_failed(mount, &error, true);
            // Claimed since before cuFile began, so the watch has not ended it.
            if job.watched.end() {
                parked.wait_then_give_back(queue, job);
            }
            return;
        }
    };
    if !job.watched.end() {
        return;
    }
    let mut to_keep = None;
    let ending = match result {
        Ok((is_present, image)) => {
            to_keep = image;
            note_route(store, mount, &job);
            store.metrics.chunks_loaded.add(1);
            store.metrics.bytes_loaded.add(job.payload.len() as u64);
            store.metrics.load_seconds.add_duration(started.elapsed());
            if is_present {
                let place = job.cache.place(&job.chunk.key);
                store.present.insert(place);
                store.known.note(place, true);
            }
            Ending::Loaded
        }
        Err(error) => {
            store.metrics.loads_failed.add(1);
            let place = job.cache.place(&job.chunk.key);
            store.present.remove(&place);
            store.known.note(place, false);
            Ending::Failed(error.to_string())
        }
    };
    queue.load_ended();
    let place = job.cache.place(&job.chunk.key);
    let is_loaded = matches!(ending, Ending::Loaded);
    let LoadJob {
        chunk,
        member,
        served_by,
        used_at,
        ..
    } = *job;
    let parts = served_by
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    member.end(ending);
    // Nobody waits any more.
    if let Some(image) = to_keep {
        store.keep_in_tier(&place, &image);
    }
    if is_loaded
        && !parts.is_empty()
        && let Some(at) = used_at.or_else(|| now_on_path(store, place.1, &place.2))
    {
        let used = PendingUse {
            place,
            chunk,
            parts,
            at,
        };
        store.metrics.touches_failed.add(queue.push_use(used));
    }
}

/// Returns how long a load may wait for its turn: the wait limit and half as long again, so that those
/// behind a path that hangs, which takes the wait limit to find out, still have theirs.
fn turn_limit(store: &StoreShared) -> Duration {
    store.wait_limit + store.wait_limit / 2
}

/// Ends a load whose turn came too late: computing has waited for it for long enough. Its path may be
/// well, only slower than it is asked for, so that is not held against it.
fn refuse(store: &StoreShared, queue: &TransferQueue, job: LoadJob, waited: Duration) {
    if !job.watched.end() {
        return;
    }
    let message = format!(
        "{:.3} s passed before the load of this chunk began",
        waited.as_secs_f64()
    );
    store.metrics.loads_failed.add(1);
    store.metrics.loads_too_late.add(1);
    store.notices.warn(Topic::LoadFailed, || {
        format!("load given up, recomputed: {message}")
    });
    queue.load_ended();
    job.member.end(Ending::Failed(message));
}

/// Puts a load back into the queue, unless the watch has ended it at this very moment.
fn put_back(queue: &TransferQueue, job: Box<LoadJob>) {
    if job.watched.end() {
        queue.give_back(job);
    }
}

/// Notes how cuFile fared with a load that went well in the end.
fn note_route(store: &StoreShared, mount: &Mount, job: &LoadJob) {
    match (&job.cufile_error, job.route) {
        (Some(error), _) => {
            store.metrics.cufile_fallbacks.add(1);
            // Bytes that POSIX reads right and cuFile wrong: that is no chance to take again.
            let lies = error.kind() == ErrorKind::Damaged;
            store.cufile_failed(mount, error, lies || is_timeout(error));
        }
        (None, Route::Slot | Route::InPlace) => {
            store.metrics.cufile_chunks_loaded.add(1);
            mount.cufile.succeeded();
        }
        (None, Route::Posix) => {}
    }
}

/// Loads one chunk. Whatever is wrong with the file, it is counted, and set aside if it is damaged.
fn load_chunk(
    store: &StoreShared,
    mount: &Mount,
    job: &LoadJob,
    buffer: LoadBuffer,
    deadline: Instant,
) -> Outcome {
    if let Err(error) = mount.health.check(&mount.root) {
        store.metrics.loads_refused_path_out.add(1);
        return Outcome::Failed(error);
    }
    let began = Instant::now();
    let place = job.cache.place(&job.chunk.key);
    let mut status = None;
    let opened = open_chunk(mount, &place);
    if let Err(error) = &opened
        && is_missing(error)
        && let Some(parts) = assemble::sources(store, job)
    {
        return assemble::load(store, job, &parts, buffer, deadline);
    }
    let outcome = match opened {
        Err(error) => Outcome::Failed(error),
        Ok((file, found)) => {
            status = Some(found);
            if let Err(error) = check_chunk(&file, &found, job.cache.file_bytes()) {
                Outcome::Failed(error)
            } else if store.bad.holds(&place, || Some(found)) {
                let known = Error::new(ErrorKind::Damaged, "found bad before, not read again");
                Outcome::Failed(known.with_path(file.path()))
            } else {
                let times = (began, deadline);
                let outcome = move_chunk(store, mount, job, &file, buffer, times);
                if job.used_at.is_some() && matches!(outcome, Outcome::Loaded(_)) {
                    job.note_use(job.cache.part);
                }
                outcome
            }
        }
    };
    let Outcome::Failed(error) = outcome else {
        return outcome;
    };
    note_failure(store, mount, place, status, began, &error);
    Outcome::Failed(error)
}

/// Moves a chunk from its open file to its blocks, by the route of the job. The load began before
/// the file was opened: a slow opening is slow as well.
fn move_chunk(
    store: &StoreShared,
    mount: &Mount,
    job: &LoadJob,
    file: &Arc<IoFile>,
    buffer: LoadBuffer,
    (began, deadline): (Instant, Instant),
) -> Outcome {
    // cuFile may use half of the time: the other half is for POSIX.
    let cufile_deadline = deadline.min(Instant::now() + store.wait_limit / 2);
    let at = |error: Error| error.with_path(file.path());
    // cuFile has deadlines of its own, and what it writes to must not be given up before it ends.
    if matches!(buffer, LoadBuffer::Slot(_)) && !job.watched.claim() {
        return Outcome::Failed(at(given_up()));
    }
    match (buffer, &job.cache.gpu) {
        (LoadBuffer::Slot(mut slot), Some(gpu)) if job.route == Route::InPlace => {
            match gpu.load_in_place(job, &mut slot, file, cufile_deadline) {
                Ok(()) => moved(job),
                Err(InPlaceFailure::Over(error)) => Outcome::Again(Some(at(error))),
                Err(InPlaceFailure::Hangs(error, handles)) => {
                    Outcome::Hangs(at(error), parked::Parked::new(handles))
                }
            }
        }
        (LoadBuffer::Slot(slot), Some(gpu)) => {
            match gpu.load_slot(job, *slot, file, cufile_deadline) {
                Ok(()) => moved(job),
                Err(error) => Outcome::Again(Some(at(error))),
            }
        }
        (LoadBuffer::Slot(_), None) => Outcome::Failed(Error::new(
            ErrorKind::InvalidArgument,
            "a VRAM slot for KV cache in host memory",
        )),
        (LoadBuffer::Host(buffer), _) if job.cache.token_file.is_some() => {
            let reader = mount.engine.reader();
            let loaded = load_tokens::load(&*reader, job, file, buffer, deadline);
            match loaded {
                Ok(image) => {
                    let bytes = job.payload.len();
                    mount.health.note(&mount.root, began, bytes, None);
                    let place = job.cache.place(&job.chunk.key);
                    Outcome::Loaded(store.tier.insert(place, image))
                }
                Err(error) => Outcome::Failed(at(error)),
            }
        }
        (LoadBuffer::Host(buffer), gpu) => {
            let loaded = match gpu {
                None => load_host::load(&*mount.engine.reader(), job, file, buffer, deadline)
                    .inspect(|_| {
                        let bytes = job.payload.len();
                        mount.health.note(&mount.root, began, bytes, None);
                    })
                    .map(|loaded| (Arc::new(loaded.image), loaded.extents)),
                Some(gpu) => load_through_host(mount, job, gpu, file, buffer, (began, deadline)),
            };
            match loaded {
                Ok((image, extents)) => {
                    let place = job.cache.place(&job.chunk.key);
                    let is_whole = extents.is_whole(&job.cache.format);
                    let image = is_whole.then_some(image);
                    Outcome::Loaded(image.and_then(|image| store.tier.insert(place, image)))
                }
                Err(error) => Outcome::Failed(at(error)),
            }
        }
    }
}

/// Ends cuFile's part of a load. Nothing touches the blocks any more, so the watch may end what of
/// the load still asks the file system.
fn moved(job: &LoadJob) -> Outcome {
    job.watched.release();
    Outcome::Loaded(None)
}

/// Moves a chunk through pinned host memory to the GPU.
fn load_through_host(
    mount: &Mount,
    job: &LoadJob,
    gpu: &GpuSide,
    file: &Arc<IoFile>,
    buffer: StagingRange,
    (began, deadline): (Instant, Instant),
) -> Result<(Arc<StagingRange>, Extents)> {
    let read = read(mount, job, gpu, file, buffer, deadline)?;
    let bytes = job.payload.len();
    mount.health.note(&mount.root, began, bytes, None);
    if !job.watched.claim() {
        return Err(given_up());
    }
    let image = Arc::new(read.image);
    let finished = gpu.finish_load(job, &image, &read.extents, &read.computed, deadline);
    job.watched.release();
    finished.map(|()| (image, read.extents))
}

/// What was read of a chunk file, one part behind the other: head, pages, page table.
struct Read {
    image: StagingRange,
    extents: Extents,
    /// Hashes of the pages; none where the GPU makes them.
    computed: Vec<u64>,
}

/// Reads what the job needs; the CPU hashes pages while later ones are read, unless a GPU does.
fn read(
    mount: &Mount,
    job: &LoadJob,
    gpu: &GpuSide,
    file: &Arc<IoFile>,
    buffer: StagingRange,
    deadline: Instant,
) -> Result<Read> {
    let format = &job.cache.format;
    let extents = Extents::new(format, &job.payload);
    let pages_start = format.payload_offset() + extents.pages.start * PAGE_BYTES;
    let hash_here = !gpu.hashes();
    let mut computed = vec![0_u64; if hash_here { extents.pages.len() } else { 0 }];
    let mut image: Option<StagingRange> = None;
    let ranges = &extents.ranges;
    let parts = image::submit(
        &*mount.engine.reader(),
        Operation::Read,
        file,
        ranges,
        buffer,
    );
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
