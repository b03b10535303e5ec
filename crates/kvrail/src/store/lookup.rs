//! Lookup: the longest prefix of chunks that all ranks have, or each chunk, in one batched call.
//!
//! What is known from earlier lookups is answered at once. For the rest, several threads claim
//! chunks in ascending order and stop at the first that is missing. No thread waits for another, so
//! lookups of several requests run side by side. On a path that takes its time for an answer, which
//! its first one shows, as many threads join as there are chunks to ask for, so that hundreds of
//! chunks cost a handful of round trips. (io_uring would ask by threads, too: the kernel's.)

use std::time::{Duration, Instant};

use super::crew::Crew;
use super::metrics::Metrics;
use super::notice::Topic;
use super::open_folders::{OpenFolders, SeenFolders};
use super::present::Place;
use super::shared::StoreShared;
use super::splits;
use super::ticket::{Issuer, LookupTicket, PresenceTicket};
use super::watch::{Overdue, Watched};
use crate::chunk::{ChunkKey, Part};
use crate::error::Result;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::channel::{Receiver, Sender, TrySendError, bounded};

/// Lookups that may wait; one more is answered with "nothing there".
const LOOKUPS_MAX: usize = 16_384;
/// Chunks for which a further thread joins a lookup: waking one costs about as much as ten
/// checks on a local file system, and far less than one on a remote one.
const CHUNKS_PER_THREAD: usize = 16;
/// A check that takes longer is a round trip to somewhere else: a local one takes a few
/// microseconds, waking a thread some tens. Models must not depend on the time.
const ROUND_TRIP: Duration = if cfg!(feature = "shuttle") {
    Duration::MAX
} else {
    Duration::from_micros(250)
};
/// So many checks of a thread in a row must take round trips until more threads join. One alone may
/// have been the system that gave the core to somebody else, and threads cost more than checks.
const ROUND_TRIPS_MIN: usize = 2;
/// Threads that wait for round trips at most, of all lookups together. 512 chunks are 8 rounds.
const WAITING_THREADS_MAX: usize = 64;

/// One lookup, shared by the threads that work on it.
#[derive(Debug)]
pub(super) struct Lookup {
    group: u32,
    parts: Vec<Part>,
    keys: Vec<ChunkKey>,
    /// The next chunk that nobody has claimed.
    next: AtomicUsize,
    /// The first chunk known to be missing; the answer when all threads are through.
    missing: AtomicUsize,
    /// Threads that still work on it, plus those that have not begun.
    working: AtomicUsize,
    /// Whether more threads were asked to join.
    has_called: AtomicBool,
    folders: OpenFolders,
    /// Whether the answer was given: by the last thread, or by the watch.
    is_answered: AtomicBool,
    submitted: Instant,
    question: Question,
}

/// What is asked, and where the answer goes.
#[derive(Debug)]
enum Question {
    /// How many leading chunks are present.
    Prefix(Issuer<usize>),
    /// Which chunks are present, and those found so far.
    Each(Issuer<Vec<bool>>, Vec<AtomicBool>),
}

/// The threads that answer lookups; they stop when this is dropped.
#[derive(Debug)]
pub(super) struct LookupQueue {
    /// The threads know it, too, but do not keep it: they end when it is gone.
    queue: Arc<Sender<Arc<Lookup>>>,
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
        let queue = Arc::new(queue);
        let (shared, waiting, others) =
            (Arc::clone(shared), lookups.clone(), Arc::downgrade(&queue));
        let body = move |crew: &Arc<Crew>| {
            for lookup in &lookups {
                let Some(watched) = announce(&shared, crew, &lookups, &lookup) else {
                    // The store was dropped and nobody watches any more.
                    lookup.give_up(&shared.metrics);
                    continue;
                };
                let call = || {
                    if let Some(queue) = others.upgrade() {
                        call_others(&shared, crew, &queue, &lookup);
                    }
                };
                work(&shared, &lookup, &watched, call);
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

    /// Submits a lookup of the longest prefix.
    pub(super) fn submit(
        &self,
        shared: &StoreShared,
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
    ) -> LookupTicket {
        let (issuer, ticket) = LookupTicket::issue();
        // What no part was asked about is not present on all of them.
        let keys = if parts.is_empty() { Vec::new() } else { keys };
        self.ask(shared, group, parts, keys, Question::Prefix(issuer));
        ticket
    }

    /// Submits a lookup of each chunk.
    pub(super) fn submit_each(
        &self,
        shared: &StoreShared,
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
    ) -> PresenceTicket {
        let (issuer, ticket) = PresenceTicket::issue();
        if parts.is_empty() {
            issuer.complete(vec![false; keys.len()]);
            return ticket;
        }
        let found = keys.iter().map(|_| AtomicBool::new(false)).collect();
        self.ask(shared, group, parts, keys, Question::Each(issuer, found));
        ticket
    }

    fn ask(
        &self,
        shared: &StoreShared,
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
        question: Question,
    ) {
        let known = known(shared, group, parts, &keys);
        shared.metrics.lookup_chunks_known.add(known as u64);
        let unknown = keys.len() - known;
        let threads = unknown.div_ceil(CHUNKS_PER_THREAD).clamp(1, self.threads);
        let lookup = Lookup::asking(question, group, parts, keys, threads);
        lookup.take_known(known);
        if unknown == 0 {
            lookup.answer(&shared.metrics, known, false);
            return;
        }
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
    }
}

/// Returns how many leading chunks are known to be there, all parts of each.
fn known(shared: &StoreShared, group: u32, parts: &[Part], keys: &[ChunkKey]) -> usize {
    // What lies on a path that is left alone is not there for now.
    if shared.mounts.iter().any(|mount| mount.health.is_out()) {
        return 0;
    }
    let places = keys
        .iter()
        .flat_map(|key| parts.iter().map(move |part| (group, *part, *key)));
    shared.known.leading(places) / parts.len().max(1)
}

/// Has more threads join a lookup: one for each chunk that nobody has claimed.
fn call_others(
    shared: &StoreShared,
    crew: &Arc<Crew>,
    queue: &Sender<Arc<Lookup>>,
    lookup: &Arc<Lookup>,
) {
    let claimed = lookup.next.load(Ordering::Acquire);
    let left = lookup.keys.len().saturating_sub(claimed);
    let others = left.min(WAITING_THREADS_MAX);
    crew.grow(others);
    // The caller is still at work, so the lookup has no answer before these are counted.
    lookup.working.fetch_add(others, Ordering::AcqRel);
    for _ in 0..others {
        if queue.try_send(Arc::clone(lookup)).is_err() {
            lookup.end_one(&shared.metrics, true);
        }
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
    /// Makes a lookup of the longest prefix that `threads` threads will work on.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn new(
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
        threads: usize,
    ) -> (LookupTicket, Self) {
        let (issuer, ticket) = LookupTicket::issue();
        let question = Question::Prefix(issuer);
        (ticket, Self::asking(question, group, parts, keys, threads))
    }

    /// As [`Lookup::new`], for each chunk.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn of_each(
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
        threads: usize,
    ) -> (PresenceTicket, Self) {
        let (issuer, ticket) = PresenceTicket::issue();
        let found = keys.iter().map(|_| AtomicBool::new(false)).collect();
        let question = Question::Each(issuer, found);
        (ticket, Self::asking(question, group, parts, keys, threads))
    }

    fn asking(
        question: Question,
        group: u32,
        parts: &[Part],
        keys: Vec<ChunkKey>,
        threads: usize,
    ) -> Self {
        Self {
            group,
            parts: parts.to_vec(),
            next: AtomicUsize::new(0),
            missing: AtomicUsize::new(keys.len()),
            working: AtomicUsize::new(threads),
            has_called: AtomicBool::new(false),
            folders: OpenFolders::default(),
            is_answered: AtomicBool::new(false),
            submitted: Instant::now(),
            question,
            keys,
        }
    }

    /// Takes the leading `known` chunks for present without a look.
    fn take_known(&self, known: usize) {
        self.next.store(known, Ordering::Release);
        if let Question::Each(_, found) = &self.question {
            for found in found.iter().take(known) {
                found.store(true, Ordering::Release);
            }
        }
    }

    /// Claims and checks chunks until none is left, or one is missing whose like ends a prefix.
    pub(super) fn check(&self, mut is_present: impl FnMut(usize, &ChunkKey) -> bool) {
        loop {
            let index = self.next.fetch_add(1, Ordering::AcqRel);
            if index >= self.missing.load(Ordering::Acquire) {
                return;
            }
            let Some(key) = self.keys.get(index) else {
                return;
            };
            let is_present = is_present(index, key);
            match &self.question {
                Question::Each(_, found) => {
                    if let Some(found) = found.get(index) {
                        found.store(is_present, Ordering::Release);
                    }
                }
                Question::Prefix(_) if !is_present => {
                    self.missing.fetch_min(index, Ordering::AcqRel);
                }
                Question::Prefix(_) => {}
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

    /// Gives the answer, unless it was given: nothing is known beyond the leading `found` chunks.
    fn answer(&self, metrics: &Metrics, found: usize, is_overdue: bool) {
        if self.is_answered.swap(true, Ordering::AcqRel) {
            return;
        }
        metrics.lookups_overdue.add(u64::from(is_overdue));
        metrics.lookups.add(1);
        metrics.chunks_looked_up.add(self.keys.len() as u64);
        metrics
            .lookup_seconds
            .add_duration(self.submitted.elapsed());
        match &self.question {
            Question::Prefix(issuer) => {
                metrics.chunks_found.add(found as u64);
                issuer.complete(found);
            }
            Question::Each(issuer, present) => {
                let present = present.iter().enumerate();
                let is_there = |(index, present): (usize, &AtomicBool)| {
                    index < found && present.load(Ordering::Acquire)
                };
                let present: Vec<bool> = present.map(is_there).collect();
                let count = present.iter().filter(|present| **present).count();
                metrics.chunks_found.add(count as u64);
                issuer.complete(present);
            }
        }
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

/// Does a thread's part of a lookup. Calls `call` when it takes round trips.
fn work(shared: &StoreShared, lookup: &Lookup, watched: &Watched, call: impl Fn()) {
    let mut seen = SeenFolders::default();
    let mut round_trips = 0;
    lookup.check(|_, key| {
        lookup.parts.iter().all(|part| {
            let mount = shared.mount(*part, key);
            let place = (lookup.group, *part, *key);
            let index = shared.mount_index(*part, key);
            watched.is_at(index);
            if mount.health.is_out() {
                return false;
            }
            let began = Instant::now();
            let found = exists(shared, lookup, watched, &mut seen, &place);
            let took = began.elapsed();
            mount
                .health
                .note(&mount.root, began, 0, found.as_ref().err());
            round_trips = if took > ROUND_TRIP {
                round_trips + 1
            } else {
                0
            };
            if round_trips >= ROUND_TRIPS_MIN && !lookup.has_called.swap(true, Ordering::AcqRel) {
                call();
            }
            match found {
                Ok(found) => {
                    shared.known.note(place, found);
                    found
                }
                Err(error) => {
                    shared.notices.warn(Topic::LookupFailed, || {
                        format!("lookup failed, taken as a miss: {error}")
                    });
                    false
                }
            }
        })
    });
    lookup.end_one(&shared.metrics, false);
}

/// Returns whether anything has a chunk's name, or those of the same heads in other ranges; loading
/// it shows whether it is any good.
fn exists(
    shared: &StoreShared,
    lookup: &Lookup,
    watched: &Watched,
    seen: &mut SeenFolders,
    place: &Place,
) -> Result<bool> {
    if is_there(shared, lookup, seen, place)? {
        return Ok(true);
    }
    let others = splits::find(shared, place, watched, |other| {
        is_there(shared, lookup, seen, other)
    });
    Ok(others?.is_some())
}

/// Returns whether anything has a chunk's name.
fn is_there(
    shared: &StoreShared,
    lookup: &Lookup,
    seen: &mut SeenFolders,
    place: &Place,
) -> Result<bool> {
    let (_, part, key) = place;
    let index = shared.mount_index(*part, key);
    let mount = shared.mount(*part, key);
    let Some(namespace) = seen.get(&lookup.folders, index, mount)? else {
        return Ok(false);
    };
    let is_there = namespace.holds(mount.directory.sign_location(place)?.below())?;
    let status = || {
        let chunk = mount.directory.chunk_location(place).ok()?;
        namespace.status(chunk.below()).ok().flatten()
    };
    Ok(is_there && !shared.bad.holds(place, status))
}
