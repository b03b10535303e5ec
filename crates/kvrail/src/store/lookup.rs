//! Lookup: the longest prefix of chunks that all ranks have, in one batched call.
//!
//! Several threads claim chunks of one lookup in ascending order and stop at the first that is
//! missing. No thread waits for another, so lookups of several requests run side by side.

use std::time::Instant;

use super::crew::Crew;
use super::directory::Location;
use super::metrics::Metrics;
use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::is_missing;
use super::shared::StoreShared;
use super::ticket::{Issuer, LookupTicket};
use super::watch::{Overdue, Watched};
use crate::chunk::ChunkKey;
use crate::error::Result;
use crate::io::Folder;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::channel::{Receiver, Sender, TrySendError, bounded};

/// Lookups that may wait; one more is answered with "nothing there".
const LOOKUPS_MAX: usize = 16_384;
/// Chunks for which a further thread joins a lookup: waking one costs about as much as ten
/// checks on a local file system, and far less than one on a remote one.
const CHUNKS_PER_THREAD: usize = 16;

/// One lookup, shared by the threads that work on it.
#[derive(Debug)]
pub(super) struct Lookup {
    group: u32,
    ranks: Vec<u32>,
    keys: Vec<ChunkKey>,
    /// The next chunk that nobody has claimed.
    next: AtomicUsize,
    /// The first chunk known to be missing; the answer when all threads are through.
    missing: AtomicUsize,
    /// Threads that still work on it, plus those that have not begun.
    working: AtomicUsize,
    /// Whether the answer was given: by the last thread, or by the watch.
    is_answered: AtomicBool,
    submitted: Instant,
    issuer: Issuer<usize>,
}

/// The threads that answer lookups; they stop when this is dropped.
#[derive(Debug)]
pub(super) struct LookupQueue {
    queue: Sender<Arc<Lookup>>,
    waiting: Receiver<Arc<Lookup>>,
    crew: Arc<Crew>,
    threads: usize,
}

impl LookupQueue {
    /// Starts the threads; `on_start` runs first on each of them.
    pub(super) fn start(
        shared: &Arc<StoreShared>,
        threads: usize,
        on_start: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self> {
        let (queue, lookups) = bounded::<Arc<Lookup>>(LOOKUPS_MAX);
        let (shared, waiting) = (Arc::clone(shared), lookups.clone());
        let body = move |crew: &Arc<Crew>| {
            for lookup in &lookups {
                let Some(watched) = announce(&shared, crew, &lookups, &lookup) else {
                    // The store was dropped and nobody watches any more.
                    lookup.give_up(&shared.metrics);
                    continue;
                };
                work(&shared, &lookup, &watched);
                shared.watch.forget(&watched);
                if !crew.goes_on(&watched) {
                    return;
                }
            }
        };
        let crew = Crew::start("lookup", threads, on_start, Box::new(body))?;
        Ok(Self {
            queue,
            waiting,
            crew,
            threads,
        })
    }

    /// Submits a lookup.
    pub(super) fn submit(
        &self,
        shared: &StoreShared,
        group: u32,
        ranks: &[u32],
        keys: Vec<ChunkKey>,
    ) -> LookupTicket {
        // What no rank was asked about is not present on all of them.
        let keys = if ranks.is_empty() { Vec::new() } else { keys };
        let threads = keys
            .len()
            .div_ceil(CHUNKS_PER_THREAD)
            .clamp(1, self.threads);
        let (ticket, lookup) = Lookup::new(group, ranks, keys, threads);
        let lookup = Arc::new(lookup);
        for _ in 0..threads {
            match self.queue.try_send(Arc::clone(&lookup)) {
                Ok(()) => {}
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    // Fewer threads work on it; if none does, it ends here as a miss.
                    lookup.end_one(&shared.metrics, true);
                }
            }
        }
        end_waiting(shared, &self.waiting, &self.crew);
        ticket
    }
}

/// Answers what waits when the last thread was lost and not replaced: nobody would. Asked after
/// something was sent and after a thread was lost, so one of the two sees what is left.
fn end_waiting(shared: &StoreShared, waiting: &Receiver<Arc<Lookup>>, crew: &Crew) {
    while crew.is_gone() {
        let Ok(lookup) = waiting.try_recv() else {
            return;
        };
        lookup.give_up(&shared.metrics);
    }
}

impl Lookup {
    /// Makes a lookup that `threads` threads will work on.
    pub(super) fn new(
        group: u32,
        ranks: &[u32],
        keys: Vec<ChunkKey>,
        threads: usize,
    ) -> (LookupTicket, Self) {
        let (issuer, ticket) = LookupTicket::issue();
        let lookup = Self {
            group,
            ranks: ranks.to_vec(),
            next: AtomicUsize::new(0),
            missing: AtomicUsize::new(keys.len()),
            working: AtomicUsize::new(threads),
            is_answered: AtomicBool::new(false),
            submitted: Instant::now(),
            issuer,
            keys,
        };
        (ticket, lookup)
    }

    /// Claims and checks chunks until one is missing or none is left.
    pub(super) fn check(&self, mut is_present: impl FnMut(usize, &ChunkKey) -> bool) {
        loop {
            let index = self.next.fetch_add(1, Ordering::AcqRel);
            if index >= self.missing.load(Ordering::Acquire) {
                return;
            }
            let Some(key) = self.keys.get(index) else {
                return;
            };
            if !is_present(index, key) {
                self.missing.fetch_min(index, Ordering::AcqRel);
            }
        }
    }

    /// Notes that a thread is through. The last one gives the answer.
    pub(super) fn end_one(&self, metrics: &Metrics, refused: bool) {
        if self.working.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let missing = self.missing.load(Ordering::Acquire);
        // Where every thread was refused, no chunk was claimed.
        let checked = !refused || self.next.load(Ordering::Acquire) >= missing;
        self.answer(metrics, if checked { missing } else { 0 }, false);
    }

    /// Gives the answer, unless it was given.
    fn answer(&self, metrics: &Metrics, found: usize, is_overdue: bool) {
        if self.is_answered.swap(true, Ordering::AcqRel) {
            return;
        }
        metrics.lookups_overdue.add(u64::from(is_overdue));
        metrics.lookups.add(1);
        metrics.chunks_looked_up.add(self.keys.len() as u64);
        metrics.chunks_found.add(found as u64);
        metrics
            .lookup_seconds
            .add_duration(self.submitted.elapsed());
        self.issuer.complete(found);
    }

    /// Answers "nothing there" because it took too long. Threads that come back find no work left.
    pub(super) fn give_up(&self, metrics: &Metrics) {
        self.missing.store(0, Ordering::Release);
        self.answer(metrics, 0, true);
    }
}

/// Tells the watch about a thread's part of a lookup. `None` when there is no watch any more.
fn announce(
    shared: &Arc<StoreShared>,
    crew: &Arc<Crew>,
    waiting: &Receiver<Arc<Lookup>>,
    lookup: &Arc<Lookup>,
) -> Option<Arc<Watched>> {
    let (watched, lookup, crew) = (Arc::default(), Arc::clone(lookup), Arc::clone(crew));
    let (lost, waiting) = (Arc::clone(&crew), waiting.clone());
    let overdue = Overdue {
        end: Box::new(move |shared| {
            lookup.give_up(&shared.metrics);
            end_waiting(shared, &waiting, &lost);
        }),
        replace: Box::new(move || crew.replace()),
    };
    let deadline = Instant::now() + shared.lookup_limit;
    let is_watched = shared.watch.begin(&watched, deadline, overdue);
    is_watched.then_some(watched)
}

/// Does a thread's part of a lookup.
fn work(shared: &StoreShared, lookup: &Lookup, watched: &Watched) {
    let mut open = OpenFolders::default();
    lookup.check(|_, key| {
        lookup.ranks.iter().all(|rank| {
            let mount = shared.mount(*rank, key);
            let place = (lookup.group, *rank, *key);
            watched.is_at(shared.mount_index(*rank, key));
            !mount.health.is_out() && exists(shared, &mut open, mount, &place)
        })
    });
    lookup.end_one(&shared.metrics, false);
}

/// The namespace's directories that a lookup has opened so far, by path; `None` is one that is not
/// there. They are few, and are closed when the lookup ends.
type OpenFolders<'a> = Vec<(&'a Mount, Option<Folder>)>;

/// Returns whether anything has a chunk's name; loading it shows whether it is any good.
fn exists<'a>(
    shared: &StoreShared,
    open: &mut OpenFolders<'a>,
    mount: &'a Mount,
    place: &Place,
) -> bool {
    let began = Instant::now();
    let found = find(open, mount, place).map(|found| {
        found.is_some_and(|(namespace, below)| {
            !shared
                .bad
                .holds(place, || namespace.status(below).ok().flatten())
        })
    });
    mount
        .health
        .note(&mount.root, began, 0, found.as_ref().err());
    found.unwrap_or_else(|error| {
        shared.notices.warn(Topic::LookupFailed, || {
            format!("lookup failed, taken as a miss: {error}")
        });
        false
    })
}

/// Returns the namespace's directory and the name below it of a chunk that is there.
fn find<'a, 'b>(
    open: &'b mut OpenFolders<'a>,
    mount: &'a Mount,
    place: &Place,
) -> Result<Option<(&'b Folder, String)>> {
    let known = open
        .iter()
        .position(|(known, _)| std::ptr::eq(*known, mount));
    let index = match known {
        Some(index) => index,
        None => {
            let opened = match mount.directory.open() {
                Ok(folder) => Some(folder),
                Err(error) if is_missing(&error) => None,
                Err(error) => return Err(error),
            };
            open.push((mount, opened));
            open.len() - 1
        }
    };
    let (group, rank, key) = place;
    let below = Location::chunk(*group, *rank, key).below();
    match open.get(index) {
        Some((_, Some(namespace))) if namespace.holds(&below)? => Ok(Some((namespace, below))),
        _ => Ok(None),
    }
}
