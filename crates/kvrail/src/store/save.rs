//! One chunk from its staging buffer into a file: hash, write, publish.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::batch::{Ending, Member};
use super::cache_shared::CacheShared;
use super::capacity::{PendingUse, Use, is_parent_pending};
use super::directory::{Location, TEMPORARY_NAME};
use super::health::is_timeout;
use super::image;
use super::manifest::ensure_manifest;
use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::{TemporaryFile, is_missing, publish_bytes};
use super::quarantine::set_aside;
use super::queue::TransferQueue;
use super::shared::StoreShared;
use super::staged::{Staged, StagedImage};
use super::ticket::StoreReport;
use super::watch::Watched;
use crate::chunk::{ChunkHead, ChunkRef, PageTable, hash_pages, root_checksum};
use crate::config::Durability;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Operation;
use crate::memory::StagingRange;

/// One chunk to store; its payload is in the buffer already.
#[derive(Debug)]
pub(super) struct StoreJob {
    pub(super) cache: Arc<CacheShared>,
    pub(super) chunk: ChunkRef,
    /// The image of the file: payload gathered, head and perhaps page table still to come.
    pub(super) image: Staged,
    pub(super) member: Member<StoreReport>,
    pub(super) submitted: Instant,
    /// What the watch knows it by.
    pub(super) watched: Arc<Watched>,
    /// When it was used, where its file is to be told.
    pub(super) used_at: Option<i64>,
}

/// How long a store waits for the GPU between two looks at whether a load needs its thread.
const GPU_STEP: Duration = Duration::from_millis(2);

/// Wait limits that a store waits for the GPU before it goes on, and finds it late.
const GPU_WAITS: u32 = 2;

/// Runs a store to its end, or gives it back to the queue for a load that waits.
pub(super) fn run(store: &StoreShared, queue: &TransferQueue, job: StoreJob) {
    let StoreJob {
        cache,
        chunk,
        image,
        member,
        submitted,
        watched,
        used_at,
    } = job;
    let mount = store.mount(cache.part, &chunk.key);
    let mut began = Instant::now();
    let result = match mount.health.check(&mount.root) {
        Ok(()) => {
            let gpu_is_there = |image: &Staged| {
                let asked = Instant::now();
                let is_there = waits_for_gpu(store, queue, image, submitted);
                // Not the path's time: the forward of a long prompt takes seconds.
                began += asked.elapsed();
                watched.put_off(asked.elapsed());
                is_there
            };
            let used = used_at.map(|at| Use {
                store,
                group: cache.group,
                part: cache.part,
                chunk: &chunk,
                watched: &watched,
                at,
            });
            let job = (&*cache, chunk, used);
            store_chunk(store, mount, job, image, gpu_is_there)
        }
        Err(error) => Err(error),
    };
    let result = match result {
        Ok(Progress::Ended(stored)) => Ok(stored),
        Err(error) => Err(error),
        Ok(Progress::NotYet(image)) => {
            if watched.end() {
                queue.give_back_store(StoreJob {
                    cache,
                    chunk,
                    image: *image,
                    member,
                    submitted,
                    watched,
                    used_at,
                });
            }
            return;
        }
    };
    let (bytes, failure) = (cache.file_bytes(), result.as_ref().err());
    mount.health.note_store(&mount.root, began, bytes, failure);
    if !watched.end() {
        return;
    }
    let ending = match result {
        Ok(Stored::Written) => {
            mount.note_success();
            store.metrics.chunks_stored.add(1);
            store.known.note(cache.place(&chunk.key), true);
            store
                .metrics
                .bytes_stored
                .add(cache.format.payload_bytes() as u64);
            store
                .metrics
                .store_seconds
                .add_duration(submitted.elapsed());
            Ending::Stored
        }
        Ok(Stored::AlreadyPresent) => {
            store.metrics.chunks_already_present.add(1);
            Ending::AlreadyPresent
        }
        Ok(Stored::BlocksReused) => {
            store.present.remove(&cache.place(&chunk.key));
            store.metrics.stores_dropped_blocks_reused.add(1);
            Ending::Dropped
        }
        Err(error) => {
            store.present.remove(&cache.place(&chunk.key));
            mount.note_failure(&error);
            if error.kind() == ErrorKind::NoSpace {
                store.metrics.stores_dropped_no_space.add(1);
                store.notices.warn(Topic::NoSpace, || {
                    format!("no space left for the KV cache, not storing for now: {error}")
                });
                Ending::Dropped
            } else if error.kind() == ErrorKind::Unavailable {
                store.metrics.stores_dropped_path_unwell.add(1);
                Ending::Dropped
            } else {
                store.metrics.stores_failed.add(1);
                store
                    .notices
                    .warn(Topic::StoreFailed, || format!("store failed: {error}"));
                Ending::Failed(error.to_string())
            }
        }
    };
    let place = cache.place(&chunk.key);
    let is_to_tell = match &ending {
        Ending::Stored => is_parent_pending(store, place, &chunk),
        ending => matches!(ending, Ending::AlreadyPresent),
    };
    queue.store_ended();
    member.end(ending);
    if let Some(at) = used_at.filter(|_| is_to_tell) {
        let used = PendingUse {
            place,
            chunk,
            parts: vec![cache.part],
            at,
        };
        store.metrics.touches_failed.add(queue.push_use(used));
    }
}

/// Waits until the GPU is through with a chunk, or its time for that is over. Returns `false` when a
/// load needs the thread: vLLM waits for that, and for this store nobody does.
fn waits_for_gpu(
    store: &StoreShared,
    queue: &TransferQueue,
    image: &Staged,
    submitted: Instant,
) -> bool {
    while image.is_pending() && submitted.elapsed() < GPU_WAITS * store.wait_limit {
        thread::sleep(GPU_STEP);
        if queue.loads_wait() {
            return false;
        }
    }
    true
}

/// How far a store came.
#[derive(Debug)]
enum Progress {
    Ended(Stored),
    /// The GPU is not through with the chunk, and a load needs the thread.
    NotYet(Box<Staged>),
}

/// What became of a chunk that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Written,
    AlreadyPresent,
    /// Its blocks changed while they were written in place; nothing was published.
    BlocksReused,
}

/// Stores one chunk, unless it is there already. `gpu_is_there` waits for the GPU, and says whether to
/// go on.
fn store_chunk(
    store: &StoreShared,
    mount: &Mount,
    (cache, chunk, used): (&CacheShared, ChunkRef, Option<Use<'_>>),
    image: Staged,
    gpu_is_there: impl FnOnce(&Staged) -> bool,
) -> Result<Progress> {
    let place = cache.place(&chunk.key);
    let location = mount.directory.chunk_location(&place)?;
    if is_present(store, mount, &place, &location, cache.file_bytes())? {
        return Ok(Progress::Ended(Stored::AlreadyPresent));
    }
    if !gpu_is_there(&image) {
        return Ok(Progress::NotYet(Box::new(image)));
    }
    mount.check_space(cache.file_bytes() as u64)?;
    let claim = store.claim_room(mount, cache.file_bytes() as u64)?;
    let save = Save {
        store,
        mount,
        cache,
        chunk,
        used,
        location: &location,
    };
    let stored = match image {
        Staged::Host(image) => save.by_posix(image),
        // Nothing failed: the path was left to POSIX before, or from the start.
        image @ Staged::Slot(_) if !mount.cufile.is_on() => save.through_host(image),
        image => save.by_cufile(image),
    };
    // Before the claim is given back: a temp file that could not be removed takes its room.
    store.capacity.keep_lingering(mount);
    let stored = stored?;
    if matches!(stored, Stored::Written) {
        claim.stored();
    }
    Ok(Progress::Ended(stored))
}

/// The parts of one store.
#[derive(Clone, Copy)]
struct Save<'a> {
    store: &'a StoreShared,
    mount: &'a Mount,
    cache: &'a CacheShared,
    chunk: ChunkRef,
    used: Option<Use<'a>>,
    location: &'a Location,
}

impl Save<'_> {
    /// Writes an image in a staging buffer.
    fn by_posix(self, image: StagedImage) -> Result<Stored> {
        let store = self.store;
        let (mut image, hashed) = image.wait(Instant::now() + store.wait_limit)?;
        let image = match &self.cache.token_file {
            None => {
                complete_image(self.cache, self.chunk, image.as_mut_slice(), hashed)?;
                image
            }
            Some(form) => {
                form.take_image(&self.cache.format, image.as_mut_slice())?;
                image.split_to(form.file_bytes())
            }
        };
        let temporary = self.create_temporary(self.mount.writes_direct())?;
        let file = temporary.file()?;
        let bytes = image.len();
        let engine = self.mount.engine.get();
        let deadline = Instant::now() + store.wait_limit;
        let whole = 0..bytes;
        let whole = std::slice::from_ref(&whole);
        let parts = image::submit(&*engine, Operation::Write, file, whole, image);
        // All parts are waited for, so that no write goes on when the file is given up.
        let results: Vec<Result<StagingRange>> =
            parts.into_iter().map(|part| part.wait(deadline)).collect();
        let image = image::rejoin(results)?;
        let written = image.len();
        if written != bytes {
            let message = format!("expected to write {bytes} bytes, wrote {written}");
            return Err(Error::new(ErrorKind::Io, message).with_path(file.path()));
        }
        let stored = self.publish(temporary)?;
        let place = self.cache.place(&self.chunk.key);
        if self.cache.token_file.is_none()
            && let Some(image) = store.tier.insert(place, Arc::new(image))
        {
            store.keep_in_tier(&place, &image);
        }
        Ok(stored)
    }

    /// Writes an image in the memory of a GPU; by POSIX, from a staging buffer, if cuFile fails.
    fn by_cufile(self, mut image: Staged) -> Result<Stored> {
        let error = match self.try_cufile(&mut image) {
            Ok(stored) => return Ok(stored),
            Err(error) => error,
        };
        let stored = self.through_host(image)?;
        if !matches!(stored, Stored::BlocksReused) {
            let store = self.store;
            store.metrics.cufile_fallbacks.add(1);
            store.cufile_failed(self.mount, &error, is_timeout(&error));
        }
        Ok(stored)
    }

    /// Writes an image in the memory of a GPU by POSIX, from a staging buffer.
    fn through_host(self, image: Staged) -> Result<Stored> {
        let deadline = Instant::now() + self.store.wait_limit;
        let buffer = self.cache.pool.take(deadline);
        let buffer = buffer.map(|mut buffer| buffer.split_to(self.cache.format.file_bytes()));
        let gpu = self.cache.gpu.as_ref().ok_or_else(no_gpu)?;
        let staged = match (image, buffer?) {
            (Staged::Host(image), _) => Some(image),
            (Staged::Slot(image), buffer) => Some(image.into_host(gpu, buffer, deadline)?),
            (Staged::InPlace(image), buffer) => {
                image.into_host(gpu, self.cache, buffer, deadline)?
            }
        };
        staged.map_or(Ok(Stored::BlocksReused), |staged| self.by_posix(staged))
    }

    fn try_cufile(self, image: &mut Staged) -> Result<Stored> {
        // cuFile may use half of the time: a call that hangs leaves the rest to POSIX.
        let deadline = Instant::now() + self.store.wait_limit / 2;
        if !self.mount.cufile.is_on() {
            let message = "cuFile is not used on this path any more";
            return Err(Error::new(ErrorKind::Gpu, message));
        }
        let gpu = self.cache.gpu.as_ref().ok_or_else(no_gpu)?;
        let temporary = self.create_temporary(self.mount.report.direct)?;
        let file = temporary.file()?;
        let same = match image {
            Staged::Host(_) => return Err(no_gpu()),
            Staged::Slot(image) => image
                .write(gpu, self.cache, self.chunk, file, deadline)
                .map(|()| true)?,
            Staged::InPlace(image) => image.write(gpu, self.cache, self.chunk, file, deadline)?,
        };
        if !same {
            return Ok(Stored::BlocksReused);
        }
        let stored = self.publish(temporary)?;
        self.store.metrics.cufile_chunks_stored.add(1);
        self.mount.cufile.succeeded();
        Ok(stored)
    }

    fn publish(self, temporary: TemporaryFile) -> Result<Stored> {
        let bytes = self.cache.file_bytes() as u64;
        if let Some(used) = self.used {
            used.stored(temporary.file()?);
        }
        let sync = self.store.durability == Durability::Full;
        temporary.publish(self.location, bytes, sync)?;
        if let Some(form) = &self.cache.token_file {
            // Last, since it is what says that the chunk is there.
            let directory = &self.mount.directory;
            let sign = directory.sign_location(&self.cache.place(&self.chunk.key))?;
            let name = self.store.writer.file_name("metadata");
            publish_bytes(directory, name, &sign, form.head(), sync)?;
        }
        Ok(Stored::Written)
    }

    /// Creates the temp file, and the namespace's directory again when somebody removed it.
    fn create_temporary(self, direct: bool) -> Result<TemporaryFile> {
        let (store, mount) = (self.store, self.mount);
        let directory = &mount.directory;
        let name = store.writer.file_name("chunk");
        let bytes = self.cache.file_bytes() as u64;
        if !mount.lacks_manifest() {
            match TemporaryFile::create(directory, name.clone(), direct, bytes) {
                Err(error) if is_missing(&error) => {}
                result => return result,
            }
        }
        mount.check_device()?;
        let sync = store.durability == Durability::Full;
        mount.set_lacks_manifest(true);
        directory.make(sync)?.make(TEMPORARY_NAME, sync)?;
        ensure_manifest(directory, &store.namespace, &store.writer, sync)?;
        mount.set_lacks_manifest(false);
        TemporaryFile::create(directory, name, direct, bytes)
    }
}

fn no_gpu() -> Error {
    let message = "a chunk in the memory of a GPU whose KV cache is on the host";
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Fills head and, unless a GPU has, page table around the payload. One pass over the payload then.
pub(super) fn complete_image(
    cache: &CacheShared,
    chunk: ChunkRef,
    image: &mut [u8],
    hashed: bool,
) -> Result<()> {
    let format = cache.format;
    if !hashed {
        let mut table = PageTable::new(&format);
        let payload_range = format.payload_offset()..format.table_offset();
        let payload = image::bytes_mut(image, payload_range)?;
        hash_pages(payload, table.pages_mut());
        let range = format.table_offset()..format.file_bytes();
        table.encode_into(image::bytes_mut(image, range)?);
    }
    let table_bytes = image::bytes_mut(image, format.table_offset()..format.file_bytes())?;
    let root = root_checksum(table_bytes);
    let head = ChunkHead {
        fields: cache.head_fields(chunk),
        format,
        root,
    };
    head.encode_into(image::bytes_mut(image, 0..format.payload_offset())?)
}

/// Returns whether a file of the right length has the chunk's name and is not known to be bad.
///
/// A folder in its place would make every rename fail, so it is set aside; anything else that is
/// no chunk is replaced by the rename.
fn is_present(
    store: &StoreShared,
    mount: &Mount,
    place: &Place,
    location: &Location,
    file_bytes: usize,
) -> Result<bool> {
    let Ok(namespace) = mount.directory.open() else {
        return Ok(false);
    };
    match namespace.status(location.below())? {
        Some(status) if status.is_file => {
            let is_whole = status.bytes == file_bytes as u64;
            if !is_whole || store.bad.holds(place, || Some(status)) {
                return Ok(false);
            }
            match mount.directory.sign_location(place)? {
                sign if sign == *location => Ok(true),
                sign => namespace.holds(sign.below()),
            }
        }
        // What lies in LMCache's directory is not ours to move.
        Some(status) if status.is_folder && mount.directory.lmcache.is_none() => {
            let reason = "a folder in a chunk's place";
            set_aside(&mount.directory, place, Some(status.inode), reason)?;
            Ok(false)
        }
        _ => Ok(false),
    }
}
