//! The store of a slab: tasks in, answers out, and nothing that waits in between.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::dispatch::Dispatch;
use super::kinds::{Kind, KindId, Kinds};
use super::object::{ObjectName, Slab, SlabObject};
use super::results::{Results, TaskId};
use super::task::{ObjectEnding, Task};
use crate::chunk::ChunkRef;
use crate::config::StoreConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::store::notice::{Notices, Topic};
use crate::store::open::thread_start;
use crate::store::{LoadChunk, MetricsSnapshot, Namespace, Notice, OpenOptions, StoreChunk};
use crate::store::{StoreReport, Ticket};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

type Removal = (Vec<ObjectName>, Arc<Task<u64>>);
type StoreJob = (Vec<SlabObject>, Arc<Task<ObjectEnding>>);
type LookupJob = (Vec<ObjectName>, Arc<Task<bool>>);
type LoadJob = (Vec<SlabObject>, Arc<Task<bool>>);

/// Stores, finds, loads and removes objects of a slab, in tasks that are worked on in the background.
///
/// Submitting never waits. A task always ends, and what did not go well in it is a miss. What is
/// submitted when 1,024 tasks of its sort wait, or after the end, is missed at once.
#[derive(Debug)]
pub struct SlabStore {
    shared: Arc<Shared>,
    next: AtomicU64,
    stores: Dispatch<StoreJob>,
    lookups: Dispatch<LookupJob>,
    loads: Dispatch<LoadJob>,
    removals: Dispatch<Removal>,
}

#[derive(Debug)]
struct Shared {
    kinds: Kinds,
    notices: Arc<Notices>,
    wait_limit: Duration,
    /// Whether tasks that wait are missed.
    is_closed: AtomicBool,
    stored: Arc<Results<ObjectEnding>>,
    found: Arc<Results<bool>>,
    loaded: Arc<Results<bool>>,
    removed: Arc<Results<u64>>,
}

impl SlabStore {
    /// Makes the store of a slab, and starts its threads. Touches no directory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for settings that cannot work, [`ErrorKind::Closed`] or
    /// [`ErrorKind::Io`] when the system gives no threads or files.
    pub fn new(config: &StoreConfig, options: OpenOptions, slab: Slab) -> Result<Self> {
        config.validate()?;
        let on_start = thread_start(options.cpus.as_deref());
        let notices = Arc::new(Notices::default());
        let shared = Arc::new(Shared {
            kinds: Kinds::new(config.clone(), options, slab, Arc::clone(&notices)),
            notices,
            wait_limit: Duration::from_secs_f64(config.wait_limit_seconds),
            is_closed: AtomicBool::new(false),
            stored: Arc::new(Results::new()?),
            found: Arc::new(Results::new()?),
            loaded: Arc::new(Results::new()?),
            removed: Arc::new(Results::new()?),
        });
        let (first, second, third, fourth) = (
            Arc::clone(&shared),
            Arc::clone(&shared),
            Arc::clone(&shared),
            Arc::clone(&shared),
        );
        Ok(Self {
            stores: Dispatch::start("slab-store", &on_start, move |(objects, task): StoreJob| {
                first.store(&objects, &task);
            })?,
            lookups: Dispatch::start("slab-lookup", &on_start, move |(names, task): LookupJob| {
                second.look_up(&names, &task);
            })?,
            loads: Dispatch::start("slab-load", &on_start, move |(objects, task): LoadJob| {
                third.load(&objects, &task);
            })?,
            removals: Dispatch::start("slab-remove", &on_start, move |(names, task): Removal| {
                fourth.remove(&names, &task);
            })?,
            next: AtomicU64::new(1),
            shared,
        })
    }

    /// Returns the kind of objects of `bytes` bytes in `namespace`. Its store is opened by the first
    /// task that needs it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a length that the slab cannot hold, or more than 64 kinds.
    pub fn kind(&self, namespace: Namespace, bytes: usize) -> Result<KindId> {
        self.shared.kinds.find(namespace, bytes)
    }

    /// Stores objects. They must stay as they are until the task is done.
    pub fn submit_store(&self, objects: Vec<SlabObject>) -> TaskId {
        let task = self.next_task();
        let answers = Task::begin(task, objects.len(), &self.shared.stored);
        // A job that is refused is dropped, which ends its task.
        self.stores.send((objects, answers));
        task
    }

    /// Looks up which objects are there.
    pub fn submit_lookup(&self, names: Vec<ObjectName>) -> TaskId {
        let task = self.next_task();
        let answers = Task::begin(task, names.len(), &self.shared.found);
        self.lookups.send((names, answers));
        task
    }

    /// Loads objects to their addresses. Each page is verified before it is copied; an object of which
    /// one is bad is missed, and its memory may hold pages before that one. It belongs to the task
    /// until that is done.
    pub fn submit_load(&self, objects: Vec<SlabObject>) -> TaskId {
        let task = self.next_task();
        let answers = Task::begin(task, objects.len(), &self.shared.loaded);
        self.loads.send((objects, answers));
        task
    }

    /// Removes objects, and waits for that. Returns the bytes of each file, 0 where there was none.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after `limit`; the work goes on.
    pub fn remove(&self, names: Vec<ObjectName>, limit: Duration) -> Result<Vec<u64>> {
        let task = self.next_task();
        let results = &self.shared.removed;
        let answers = Task::begin(task, names.len(), results);
        self.removals.send((names, answers));
        results.wait(task, limit)
    }

    /// Takes how each object of each finished store ended, oldest task first.
    pub fn take_stores(&self) -> Vec<(TaskId, Vec<ObjectEnding>)> {
        self.shared.stored.take_all()
    }

    /// Takes which objects of a lookup are there; `None` while that is not known.
    pub fn take_lookup(&self, task: TaskId) -> Option<Vec<bool>> {
        self.shared.found.take(task)
    }

    /// Takes which objects of a load were loaded; `None` while that is not known.
    pub fn take_load(&self, task: TaskId) -> Option<Vec<bool>> {
        self.shared.loaded.take(task)
    }

    /// Waits for which objects of a lookup are there.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after `limit`; the answer can be taken later.
    pub fn wait_for_lookup(&self, task: TaskId, limit: Duration) -> Result<Vec<bool>> {
        self.shared.found.wait(task, limit)
    }

    /// Waits for which objects of a load were loaded.
    ///
    /// # Errors
    /// As [`SlabStore::wait_for_lookup`]; the memory is the task's until it is done.
    pub fn wait_for_load(&self, task: TaskId, limit: Duration) -> Result<Vec<bool>> {
        self.shared.loaded.wait(task, limit)
    }

    /// Returns the eventfds that become readable when a store, a lookup, a load is done. They are
    /// this store's and live as it does.
    pub fn events(&self) -> [RawFd; 3] {
        let shared = &self.shared;
        [
            shared.stored.event(),
            shared.found.event(),
            shared.loaded.event(),
        ]
    }

    /// Returns the counters of each store that is open, by the name of its directory.
    pub fn metrics(&self) -> Vec<(String, MetricsSnapshot)> {
        let stores = self.shared.kinds.open_stores().into_iter();
        stores
            .map(|store| (store.namespace().directory_name(), store.metrics()))
            .collect()
    }

    /// Takes the notices that have come since the last call.
    pub fn take_notices(&self) -> Vec<Notice> {
        let mut notices = self.shared.notices.take();
        for store in self.shared.kinds.open_stores() {
            notices.extend(store.take_notices());
        }
        notices
    }

    /// Ends everything: stores that have begun are waited for, all else that waits is missed. After
    /// it returned without an error nothing reads or writes the slab any more.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when something was not done within `limit`.
    pub fn close(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.shared.is_closed.store(true, Ordering::Release);
        self.stores.close();
        self.lookups.close();
        self.loads.close();
        self.removals.close();
        let gathered = self.shared.stored.wait_for_all(deadline);
        let closed = self.shared.kinds.close(deadline);
        if gathered && self.shared.loaded.wait_for_all(deadline) {
            return closed;
        }
        let message = format!("tasks were not done within {:.3} s", limit.as_secs_f64());
        Err(Error::new(ErrorKind::TimedOut, message))
    }

    fn next_task(&self) -> TaskId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for SlabStore {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::Release);
    }
}

impl Shared {
    fn store(&self, objects: &[SlabObject], task: &Arc<Task<ObjectEnding>>) {
        let deadline = Instant::now() + self.wait_limit;
        for (index, object) in objects.iter().enumerate() {
            if self.is_closed.load(Ordering::Acquire) {
                return;
            }
            match self.store_one(object, deadline) {
                Err(error) => self.warn(Topic::StoreFailed, "not stored", &error),
                Ok(ticket) => {
                    let task = Arc::clone(task);
                    ticket.tell(move |report| task.answer(index, ending(&report)));
                }
            }
        }
    }

    fn store_one(&self, object: &SlabObject, deadline: Instant) -> Result<Ticket<StoreReport>> {
        let name = &object.name;
        let kind = self.kind(name.kind)?;
        let blocks = self.kinds.slab().blocks(object.address, kind.bytes)?;
        let chunk = chunk(name);
        let cache = self.kinds.cache(&kind, name.group, name.rank)?;
        cache.store_patiently(&[StoreChunk { chunk, blocks }], deadline)
    }

    fn look_up(&self, names: &[ObjectName], task: &Arc<Task<bool>>) {
        for (first, members) in by_cache(names.iter().copied()) {
            if self.is_closed.load(Ordering::Acquire) {
                return;
            }
            let store = self
                .kind(first.kind)
                .and_then(|kind| self.kinds.store(&kind));
            match store {
                Err(error) => self.warn(Topic::LookupFailed, "taken as a miss", &error),
                Ok(store) => {
                    let keys = members.iter().map(|(_, name)| name.key).collect();
                    let indices: Vec<usize> = members.iter().map(|(index, _)| *index).collect();
                    let task = Arc::clone(task);
                    let ticket = store.lookup_each(first.group, &[first.rank], keys);
                    ticket.tell(move |present| {
                        for (index, present) in indices.iter().zip(present) {
                            task.answer(*index, present);
                        }
                    });
                }
            }
        }
    }

    fn load(&self, objects: &[SlabObject], task: &Arc<Task<bool>>) {
        for (first, members) in by_cache(objects.iter().map(|object| object.name)) {
            if self.is_closed.load(Ordering::Acquire) {
                return;
            }
            if let Err(error) = self.load_some(objects, &first, &members, task) {
                self.warn(Topic::LoadFailed, "not loaded", &error);
            }
        }
    }

    /// Loads those of `objects` that one KV cache has.
    fn load_some(
        &self,
        objects: &[SlabObject],
        first: &ObjectName,
        members: &[(usize, ObjectName)],
        task: &Arc<Task<bool>>,
    ) -> Result<()> {
        let kind = self.kind(first.kind)?;
        let cache = self.kinds.cache(&kind, first.group, first.rank)?;
        let mut indices = Vec::with_capacity(members.len());
        let mut chunks = Vec::with_capacity(members.len());
        for (index, name) in members {
            let address = objects.get(*index).map_or(0, |object| object.address);
            // One that lies elsewhere is that one's miss only.
            match self.kinds.slab().blocks(address, kind.bytes) {
                Err(error) => self.warn(Topic::LoadFailed, "not loaded", &error),
                Ok(blocks) => {
                    indices.push(*index);
                    chunks.push(LoadChunk {
                        chunk: chunk(name),
                        first_block: 0,
                        blocks,
                    });
                }
            }
        }
        let task = Arc::clone(task);
        cache.load(chunks)?.tell(move |report| {
            for (position, index) in indices.iter().enumerate() {
                let is_loaded = report.failed.binary_search(&position).is_err();
                task.answer(*index, is_loaded);
            }
        });
        Ok(())
    }

    fn remove(&self, names: &[ObjectName], task: &Task<u64>) {
        for (first, members) in by_cache(names.iter().copied()) {
            if self.is_closed.load(Ordering::Acquire) {
                return;
            }
            let store = self
                .kind(first.kind)
                .and_then(|kind| self.kinds.store(&kind));
            match store {
                Err(error) => self.warn(Topic::Capacity, "not removed", &error),
                Ok(store) => {
                    let keys: Vec<_> = members.iter().map(|(_, name)| name.key).collect();
                    let removed = store.remove(first.group, first.rank, &keys);
                    for ((index, _), bytes) in members.iter().zip(removed) {
                        task.answer(*index, bytes);
                    }
                }
            }
        }
    }

    fn kind(&self, id: KindId) -> Result<Arc<Kind>> {
        self.kinds.get(id).ok_or_else(|| {
            let message = format!("no kind of objects has the number {}", id.number());
            Error::new(ErrorKind::InvalidArgument, message)
        })
    }

    fn warn(&self, topic: Topic, what: &str, error: &Error) {
        self.notices.warn(topic, || format!("{what}: {error}"));
    }
}

fn chunk(name: &ObjectName) -> ChunkRef {
    ChunkRef {
        key: name.key,
        parent: None,
    }
}

fn ending(report: &StoreReport) -> ObjectEnding {
    match report {
        report if report.stored > 0 => ObjectEnding::Stored,
        report if report.already_present > 0 => ObjectEnding::AlreadyPresent,
        _ => ObjectEnding::Missed,
    }
}

/// Sorts names by what has a KV cache of its own: kind, group and rank. Each part with its first.
fn by_cache(
    names: impl Iterator<Item = ObjectName>,
) -> Vec<(ObjectName, Vec<(usize, ObjectName)>)> {
    let mut parts: Vec<(ObjectName, Vec<(usize, ObjectName)>)> = Vec::new();
    for (index, name) in names.enumerate() {
        let same = |first: &ObjectName| {
            (first.kind, first.group, first.rank) == (name.kind, name.group, name.rank)
        };
        match parts.iter_mut().find(|(first, _)| same(first)) {
            Some((_, members)) => members.push((index, name)),
            None => parts.push((name, vec![(index, name)])),
        }
    }
    parts
}
