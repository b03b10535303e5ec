//! The queue of chunk transfers: loads before stores, and then the uses that files are to be told. All
//! are bounded.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::capacity::PendingUse;
use super::load_job::{LoadBuffer, LoadJob};
use super::save::StoreJob;
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Loads that may wait; a request of a million tokens has 4,000 chunks of 256.
const LOADS_MAX: usize = 65_536;
/// Uses that wait to be told. Those beyond are not told: their chunks seem older than they are.
const USES_MAX: usize = 65_536;
/// How long a use lets stores go first.
const USE_WAITS: Duration = Duration::from_secs(1);

/// What a worker does next.
#[derive(Debug)]
pub(super) enum Job {
    /// A load with its staging buffer, or without one: then the worker waits for it.
    Load(Box<LoadJob>, Option<LoadBuffer>),
    /// A store; its staging buffer is filled already.
    Store(Box<StoreJob>),
    /// The use of a chunk by a job that has ended, for its file to be told.
    Use(Box<PendingUse>),
}

/// Waiting transfers, and the number of those under way.
#[derive(Debug, Default)]
pub(super) struct TransferQueue {
    state: Mutex<State>,
    /// A job came, or none comes any more. Only workers wait for it: one that is told alone must
    /// not be somebody who waits for an end.
    came: Condvar,
    /// A store ended, or a use.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    loads: VecDeque<Box<LoadJob>>,
    stores: VecDeque<Box<StoreJob>>,
    /// With the times since when they wait.
    uses: VecDeque<(Instant, Box<PendingUse>)>,
    loads_running: usize,
    stores_running: usize,
    is_telling: bool,
    closed: bool,
    /// Whether there is no thread to do anything; see [`TransferQueue::strand_if`].
    stranded: bool,
}

impl State {
    /// Takes the first use if it has waited for so long. One at a time: its path may hang, and nobody
    /// waits for it.
    fn take_use(&mut self, waited: Duration) -> Option<Box<PendingUse>> {
        let (since, _) = self.uses.front()?;
        if self.is_telling || self.closed || since.elapsed() < waited {
            return None;
        }
        self.is_telling = true;
        self.uses.pop_front().map(|(_, used)| used)
    }
}

impl TransferQueue {
    /// Adds loads. Gives back those for which there is no room.
    pub(super) fn push_loads(&self, jobs: Vec<LoadJob>) -> Vec<LoadJob> {
        let mut refused = Vec::new();
        let mut state = self.lock();
        for job in jobs {
            if state.closed || state.stranded || state.loads.len() >= LOADS_MAX {
                refused.push(job);
            } else {
                state.loads.push_back(Box::new(job));
            }
        }
        drop(state);
        self.came.notify_all();
        refused
    }

    /// Adds a store. Staging buffers bound their number: each waiting store owns one.
    ///
    /// Returns whether it was taken; a queue that is closed or has no workers ends it as failed.
    pub(super) fn push_store(&self, job: StoreJob) -> bool {
        let mut state = self.lock();
        if state.closed || state.stranded {
            // Ended without the lock: that completes a ticket.
            drop(state);
            drop(job);
            return false;
        }
        state.stores.push_back(Box::new(job));
        drop(state);
        self.came.notify_one();
        true
    }

    /// Adds a use to be told. Returns how many are not: 1 when there is no room for it.
    pub(super) fn push_use(&self, used: PendingUse) -> u64 {
        let mut state = self.lock();
        if state.closed || state.uses.len() >= USES_MAX {
            return 1;
        }
        state.uses.push_back((Instant::now(), Box::new(used)));
        drop(state);
        self.came.notify_one();
        0
    }

    /// Returns whether any load waits or is under way.
    pub(super) fn has_loads(&self) -> bool {
        let state = self.lock();
        !state.loads.is_empty() || state.loads_running > 0
    }

    /// Returns whether a load waits for a thread.
    pub(super) fn loads_wait(&self) -> bool {
        !self.lock().loads.is_empty()
    }

    /// Waits for the next job; `None` when the queue is closed and empty of stores.
    ///
    /// A use goes last, but before stores when it has waited for a while: eviction goes by what files
    /// say. A load goes first. When it has no staging buffer but a store waits, the store goes: it
    /// holds a buffer that the load may be waiting for.
    pub(super) fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(load) = state.loads.pop_front() {
                let buffer = load.try_take_buffer();
                match (buffer, state.stores.pop_front()) {
                    (None, Some(store)) => {
                        state.loads.push_front(load);
                        state.stores_running += 1;
                        return Some(Job::Store(store));
                    }
                    (buffer, store) => {
                        if let Some(store) = store {
                            state.stores.push_front(store);
                        }
                        state.loads_running += 1;
                        return Some(Job::Load(load, buffer));
                    }
                }
            }
            if let Some(used) = state.take_use(USE_WAITS) {
                return Some(Job::Use(used));
            }
            if let Some(store) = state.stores.pop_front() {
                state.stores_running += 1;
                return Some(Job::Store(store));
            }
            if state.closed {
                return None;
            }
            if let Some(used) = state.take_use(Duration::ZERO) {
                return Some(Job::Use(used));
            }
            state = self
                .came
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts a load back in front that got no staging buffer for a while.
    ///
    /// So that a worker which waits for a buffer never keeps the store that holds it from running.
    pub(super) fn give_back(&self, load: Box<LoadJob>) {
        let mut state = self.lock();
        state.loads_running -= 1;
        if !state.closed && !state.stranded {
            state.loads.push_front(load);
        }
        drop(state);
        self.came.notify_one();
    }

    /// Puts a store back in front that is not needed to run yet while loads wait.
    pub(super) fn give_back_store(&self, store: StoreJob) {
        let mut state = self.lock();
        state.stores_running -= 1;
        if state.closed || state.stranded {
            // Ended without the lock, as in `push_store`.
            drop(state);
            self.ended.notify_all();
            drop(store);
            return;
        }
        state.stores.push_front(Box::new(store));
        drop(state);
        self.came.notify_one();
    }

    /// Notes the end of a load.
    pub(super) fn load_ended(&self) {
        self.lock().loads_running -= 1;
    }

    /// Notes the end of a store.
    pub(super) fn store_ended(&self) {
        self.lock().stores_running -= 1;
        self.ended.notify_all();
    }

    /// Notes that a use was told.
    pub(super) fn use_ended(&self) {
        let mut state = self.lock();
        state.is_telling = false;
        let is_next = !state.uses.is_empty();
        drop(state);
        self.ended.notify_all();
        if is_next {
            self.came.notify_one();
        }
    }

    /// Waits until no store waits or is under way. Returns whether that came in time.
    pub(super) fn wait_for_stores(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !state.stores.is_empty() || state.stores_running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let waited = self.ended.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Waits until all uses were told, for `limit` at most.
    pub(super) fn wait_for_uses(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !state.uses.is_empty() || state.is_telling {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO || state.stranded {
                return;
            }
            let waited = self.ended.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Refuses new jobs and ends the waiting ones: loads as failed, stores as well.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let ended = (
            std::mem::take(&mut state.loads),
            std::mem::take(&mut state.stores),
            std::mem::take(&mut state.uses),
        );
        drop(state);
        self.came.notify_all();
        self.ended.notify_all();
        // Dropped without the lock: ending a job completes tickets.
        drop(ended);
    }

    /// Refuses new jobs from now on if nobody is left to do them. Returns those that waited.
    ///
    /// `is_gone` is asked under the lock, so that a thread which comes back at the same moment is
    /// seen here, or calls [`TransferQueue::resume`] after this.
    pub(super) fn strand_if(
        &self,
        is_gone: impl FnOnce() -> bool,
    ) -> (VecDeque<Box<LoadJob>>, VecDeque<Box<StoreJob>>) {
        let mut state = self.lock();
        if !is_gone() {
            return Default::default();
        }
        state.stranded = true;
        let waiting = (
            std::mem::take(&mut state.loads),
            std::mem::take(&mut state.stores),
        );
        drop(state);
        self.ended.notify_all();
        waiting
    }

    /// Takes jobs again: a thread came back.
    pub(super) fn resume(&self) {
        self.lock().stranded = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
