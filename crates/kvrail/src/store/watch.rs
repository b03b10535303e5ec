//! The watch: it ends the jobs whose thread hangs in the file system, and has paths probed.
//!
//! Jobs do their file operations on the thread that works on them, so none of them costs a switch
//! of threads. Each is announced here with its deadline. When it is not done by then, the watch
//! ends it in its thread's place (a load as failed, a lookup with "nothing there"), takes the path
//! out of use and starts another thread for the one that is lost. A thread that comes back finds
//! that its job was given up, throws away what it has and ends.
//!
//! A load that is about to write to its blocks claims that first: after it was given up they
//! belong to somebody else.

use std::time::{Duration, Instant};

use super::mount::Mount;
use super::shared::StoreShared;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use crate::sync::thread;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// How often the watch looks: what is overdue ends that much after its deadline at the latest.
const TICK: Duration = Duration::from_millis(100);

const RUNNING: u8 = 0;
const CLAIMED: u8 = 1;
const ENDED: u8 = 2;
const GIVEN_UP: u8 = 3;
/// Given up, and another thread does the work from now on.
const REPLACED: u8 = 4;
/// Given up, and nobody could be started in the thread's place.
const NOT_REPLACED: u8 = 5;

/// A job that a thread works on, as its thread and the watch see it.
#[derive(Debug, Default)]
pub(super) struct Watched {
    state: AtomicU8,
    /// The mount that the job is at, by index.
    mount: AtomicUsize,
    /// Milliseconds that the job waited for something else than the file system.
    waited: AtomicU64,
}

impl Watched {
    fn advance(&self, from: u8, to: u8) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Keeps the watch from giving the job up; `false` when it was given up already.
    ///
    /// For as long as memory is written that the job's end gives back.
    #[must_use]
    pub(super) fn claim(&self) -> bool {
        self.advance(RUNNING, CLAIMED)
    }

    /// Ends a claim.
    pub(super) fn release(&self) {
        self.advance(CLAIMED, RUNNING);
    }

    /// Notes the job's end; `false` when the watch has ended it before.
    #[must_use]
    pub(super) fn end(&self) -> bool {
        self.advance(CLAIMED, ENDED) || self.advance(RUNNING, ENDED)
    }

    /// Notes which mount the job is at. Returns the one that it was at before.
    pub(super) fn is_at(&self, mount: usize) -> usize {
        self.mount.swap(mount, Ordering::Relaxed)
    }

    /// Puts off the job's deadline, which is the file system's, by what the job waited for others.
    pub(super) fn put_off(&self, waited: Duration) {
        let milliseconds = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        self.waited.fetch_add(milliseconds, Ordering::Relaxed);
    }

    fn waited(&self) -> Duration {
        Duration::from_millis(self.waited.load(Ordering::Relaxed))
    }

    /// Returns whether another thread was started in the place of the job's; `None` when the job
    /// was not given up.
    pub(super) fn given_up(&self) -> Option<bool> {
        // The watch decides right after giving the job up.
        while self.state.load(Ordering::Acquire) == GIVEN_UP {
            thread::yield_now();
        }
        match self.state.load(Ordering::Acquire) {
            REPLACED => Some(true),
            NOT_REPLACED => Some(false),
            _ => None,
        }
    }

    /// A job that was given up, for tests.
    #[cfg(test)]
    pub(super) fn replaced() -> Self {
        Self {
            state: AtomicU8::new(REPLACED),
            mount: AtomicUsize::new(0),
            waited: AtomicU64::new(0),
        }
    }
}

/// Ends a job in its thread's place.
pub(super) type End = Box<dyn FnOnce(&StoreShared) + Send>;

/// What the watch does about a job that is overdue.
pub(super) struct Overdue {
    pub(super) end: End,
    /// Starts another thread for the one that is lost. Returns whether there is one.
    pub(super) replace: Box<dyn FnOnce() -> bool + Send>,
}

pub(super) struct Entry {
    watched: Arc<Watched>,
    began: Instant,
    deadline: Instant,
    overdue: Option<Overdue>,
}

/// The jobs under way.
#[derive(Default)]
pub(super) struct Watch {
    state: Mutex<State>,
    closed: Condvar,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    is_closed: bool,
    /// Nobody looks any more.
    is_over: bool,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        out.debug_struct("Watch")
            .field("jobs", &state.entries.len())
            .field("is_closed", &state.is_closed)
            .finish()
    }
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a job that its thread begins now and shall be done with at `deadline`.
    ///
    /// Returns whether it is watched: when the watch has ended, nobody would end a job that hangs.
    #[must_use]
    pub(super) fn begin(
        &self,
        watched: &Arc<Watched>,
        deadline: Instant,
        overdue: Overdue,
    ) -> bool {
        let entry = Entry {
            watched: Arc::clone(watched),
            began: Instant::now(),
            deadline,
            overdue: Some(overdue),
        };
        let mut state = self.lock();
        if state.is_over {
            // Dropped without the lock: it may hold the last reference to a ticket.
            drop(state);
            drop(entry);
            return false;
        }
        state.entries.push(entry);
        true
    }

    /// Takes a job off the list, however it ended.
    pub(super) fn forget(&self, watched: &Arc<Watched>) {
        let mut state = self.lock();
        let found = state
            .entries
            .iter()
            .position(|entry| Arc::ptr_eq(&entry.watched, watched));
        let entry = found.map(|index| state.entries.swap_remove(index));
        drop(state);
        // Dropped without the lock: it may hold the last reference to a ticket.
        drop(entry);
    }

    /// Ends the watch's thread as soon as no job is under way: the tickets of those that are may
    /// be all that is left of the store, and must end, too.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.closed.notify_all();
    }

    /// Takes what is overdue off the list, given up.
    pub(super) fn take_overdue(&self, now: Instant) -> Vec<Entry> {
        let mut state = self.lock();
        let mut overdue = Vec::new();
        let mut index = 0;
        while let Some(entry) = state.entries.get(index) {
            let deadline = entry.deadline + entry.watched.waited();
            if now >= deadline && entry.watched.advance(RUNNING, GIVEN_UP) {
                overdue.push(state.entries.swap_remove(index));
            } else {
                index += 1;
            }
        }
        overdue
    }

    /// Waits for the next look. Returns whether there is one.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.lock();
        if !state.is_closed || !state.entries.is_empty() {
            let waited = self.closed.wait_timeout(state, TICK);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.is_over = state.is_closed && state.entries.is_empty();
        !state.is_over
    }
}

/// Starts the watch over `shared`; it ends when the watch is closed.
pub(super) fn start(
    shared: &Arc<StoreShared>,
    on_start: &Arc<dyn Fn() + Send + Sync>,
) -> Result<()> {
    let (shared, on_start) = (Arc::clone(shared), Arc::clone(on_start));
    thread::Builder::new()
        .name("kvrail-watch".to_owned())
        .spawn(move || {
            on_start();
            while shared.watch.wait() {
                look(&shared);
            }
        })
        .map(drop)
        .map_err(|source| Error::new(ErrorKind::Io, "start the watch's thread").with_source(source))
}

/// Ends what is overdue, looks after the janitors and begins the probes that are due.
fn look(shared: &Arc<StoreShared>) {
    for mut entry in shared.watch.take_overdue(Instant::now()) {
        let index = entry.watched.mount.load(Ordering::Relaxed);
        if let Some(mount) = shared.mounts.get(index) {
            let message = format!(
                "an operation was not done within {:.3} s",
                entry.began.elapsed().as_secs_f64()
            );
            mount.health.note_hung(&mount.root, message);
        }
        if let Some(overdue) = entry.overdue.take() {
            // Before the job ends, so that who waits for its end finds a thread for the next one.
            let decided = if (overdue.replace)() {
                REPLACED
            } else {
                NOT_REPLACED
            };
            (overdue.end)(shared);
            entry.watched.state.store(decided, Ordering::Release);
        }
    }
    shared.capacity.watch(&shared.mounts, shared.wait_limit);
    for mount in &shared.mounts {
        probe(shared, mount);
    }
}

/// Has a mount probed if that is due. Does not wait for it.
fn probe(shared: &Arc<StoreShared>, mount: &Arc<Mount>) {
    if !mount.health.begin_probe() {
        return;
    }
    let (theirs, weak): (_, Weak<StoreShared>) = (Arc::clone(mount), Arc::downgrade(shared));
    let started = thread::Builder::new()
        .name("kvrail-probe".to_owned())
        .spawn(move || {
            let began = Instant::now();
            let is_well = match weak.upgrade() {
                Some(shared) => super::recovery::check(&shared, &theirs).is_ok(),
                None => false,
            };
            theirs
                .health
                .end_probe(&theirs.root, is_well, began.elapsed());
        });
    if started.is_err() {
        mount.health.end_probe(&mount.root, false, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overdue() -> Overdue {
        Overdue {
            end: Box::new(|_| ()),
            replace: Box::new(|| true),
        }
    }

    #[test]
    fn what_is_claimed_or_has_ended_is_never_given_up() {
        let watch = Watch::default();
        let later = Instant::now() + Duration::from_secs(3600);
        let jobs: Vec<Arc<Watched>> = (0..3).map(|_| Arc::default()).collect();
        for job in &jobs {
            assert!(watch.begin(job, Instant::now(), overdue()));
        }
        assert!(jobs[0].claim());
        assert!(jobs[1].end());
        assert_eq!(watch.take_overdue(later).len(), 1);
        assert!(!jobs[2].claim() && !jobs[2].end(), "it was given up");
        jobs[0].release();
        assert_eq!(watch.take_overdue(later).len(), 1);
        assert!(!jobs[0].end());
        watch.forget(&jobs[1]);
        assert!(watch.lock().entries.is_empty());
    }

    #[test]
    fn a_job_that_waited_for_others_has_as_much_more_time() {
        let watch = Watch::default();
        let job = Arc::default();
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        assert!(watch.begin(&job, now + second, overdue()));
        job.put_off(2 * second);
        job.put_off(second);
        assert!(watch.take_overdue(now + 3 * second).is_empty());
        assert_eq!(watch.take_overdue(now + 4 * second).len(), 1);
    }

    #[test]
    fn nothing_is_given_up_before_its_time_and_closing_waits_for_jobs_under_way() {
        let watch = Watch::default();
        let job = Arc::default();
        let later = Instant::now() + Duration::from_secs(3600);
        assert!(watch.begin(&job, later, overdue()));
        assert!(watch.take_overdue(Instant::now()).is_empty());
        watch.close();
        assert!(watch.wait(), "a job is under way");
        assert_eq!(watch.take_overdue(later).len(), 1);
        assert!(!watch.wait());
        assert!(!watch.begin(&job, later, overdue()), "nobody looks");
    }
}
