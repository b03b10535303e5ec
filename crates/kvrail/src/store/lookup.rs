//! Lookup: the longest prefix of chunks that all ranks have, in one batched call.
//!
//! Several threads claim chunks of one lookup in ascending order and stop at the first that is
//! missing. No thread waits for another, so lookups of several requests run side by side.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Sender, TrySendError, bounded};

use super::directory::Location;
use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::is_missing;
use super::shared::StoreShared;
use super::ticket::{Issuer, LookupTicket};
use crate::chunk::ChunkKey;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Folder;

/// Lookups that may wait; one more is answered with "nothing there".
const LOOKUPS_MAX: usize = 16_384;
/// Chunks for which a further thread joins a lookup: waking one costs about as much as ten
/// checks on a local file system, and far less than one on a remote one.
const CHUNKS_PER_THREAD: usize = 16;

/// One lookup, shared by the threads that work on it.
#[derive(Debug)]
struct Lookup {
    group: u32,
    ranks: Vec<u32>,
    keys: Vec<ChunkKey>,
    /// The next chunk that nobody has claimed.
    next: AtomicUsize,
    /// The first chunk known to be missing; the answer when all threads are through.
    missing: AtomicUsize,
    /// Threads that still work on it, plus those that have not begun.
    working: AtomicUsize,
    submitted: Instant,
    issuer: Issuer<usize>,
}

/// The threads that answer lookups; they stop when this is dropped.
#[derive(Debug)]
pub(super) struct LookupQueue {
    queue: Sender<Arc<Lookup>>,
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
        for index in 0..threads {
            let (shared, lookups) = (Arc::clone(shared), lookups.clone());
            let on_start = Arc::clone(on_start);
            thread::Builder::new()
                .name(format!("kvrail-lookup-{index}"))
                .spawn(move || {
                    on_start();
                    for lookup in lookups {
                        work(&shared, &lookup);
                    }
                })
                .map_err(|source| {
                    Error::new(ErrorKind::Io, "start a lookup thread").with_source(source)
                })?;
        }
        Ok(Self { queue, threads })
    }

    /// Submits a lookup.
    pub(super) fn submit(
        &self,
        shared: &StoreShared,
        group: u32,
        ranks: &[u32],
        keys: Vec<ChunkKey>,
    ) -> LookupTicket {
        let (issuer, ticket) = LookupTicket::issue();
        // What no rank was asked about is not present on all of them.
        let keys = if ranks.is_empty() { Vec::new() } else { keys };
        let threads = keys
            .len()
            .div_ceil(CHUNKS_PER_THREAD)
            .clamp(1, self.threads);
        let lookup = Arc::new(Lookup {
            group,
            ranks: ranks.to_vec(),
            next: AtomicUsize::new(0),
            missing: AtomicUsize::new(keys.len()),
            working: AtomicUsize::new(threads),
            submitted: Instant::now(),
            issuer,
            keys,
        });
        for _ in 0..threads {
            match self.queue.try_send(Arc::clone(&lookup)) {
                Ok(()) => {}
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    // Fewer threads work on it; if none does, it ends here as a miss.
                    lookup.end_one(shared, true);
                }
            }
        }
        ticket
    }
}

impl Lookup {
    /// Notes that a thread is through. The last one gives the answer.
    fn end_one(&self, shared: &StoreShared, refused: bool) {
        if self.working.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        // Where every thread was refused, no chunk was claimed.
        let checked = !refused || self.next.load(Ordering::Acquire) >= self.keys.len();
        let found = if checked {
            self.missing.load(Ordering::Acquire)
        } else {
            0
        };
        let metrics = &shared.metrics;
        metrics.lookups.add(1);
        metrics.chunks_looked_up.add(self.keys.len() as u64);
        metrics.chunks_found.add(found as u64);
        metrics
            .lookup_seconds
            .add_duration(self.submitted.elapsed());
        self.issuer.complete(found);
    }
}

/// Claims and checks chunks until one is missing or none is left.
fn work(shared: &StoreShared, lookup: &Lookup) {
    let mut open = OpenFolders::default();
    loop {
        let index = lookup.next.fetch_add(1, Ordering::AcqRel);
        if index >= lookup.missing.load(Ordering::Acquire) {
            break;
        }
        let Some(key) = lookup.keys.get(index) else {
            break;
        };
        let present = lookup.ranks.iter().all(|rank| {
            let mount = shared.mount(*rank, key);
            let place = (lookup.group, *rank, *key);
            exists(shared, &mut open, mount, &place)
        });
        if !present {
            lookup.missing.fetch_min(index, Ordering::AcqRel);
        }
    }
    lookup.end_one(shared, false);
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
    let found = find(open, mount, place).map(|found| {
        found.is_some_and(|(namespace, below)| {
            !shared
                .bad
                .holds(place, || namespace.status(below).ok().flatten())
        })
    });
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
