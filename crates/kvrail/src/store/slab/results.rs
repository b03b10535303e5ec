//! The answers of tasks that are done, until somebody takes them, and the event that tells of them.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a task is known by: unique in a [`SlabStore`](super::SlabStore).
pub type TaskId = u64;

/// Answers that may wait; the oldest goes when another one comes. A caller takes each within
/// moments, so what is this old was forgotten.
const WAITING_MAX: usize = 65_536;

/// The answers of one kind of tasks.
#[derive(Debug)]
pub(super) struct Results<T> {
    state: Mutex<State<T>>,
    /// A task was done.
    ended: Condvar,
    event: OwnedFd,
}

#[derive(Debug)]
struct State<T> {
    /// By task, which is by age.
    done: BTreeMap<TaskId, Vec<T>>,
    /// Tasks that are not done.
    under_way: usize,
}

impl<T> Results<T> {
    /// Makes an empty one with an event of its own.
    ///
    /// # Errors
    /// Those of the system: too many files are open.
    pub(super) fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags).map_err(|errno| {
            let source = std::io::Error::from(errno);
            Error::new(ErrorKind::Io, "no eventfd for the ends of tasks").with_source(source)
        })?;
        Ok(Self {
            state: Mutex::new(State {
                done: BTreeMap::new(),
                under_way: 0,
            }),
            ended: Condvar::new(),
            event,
        })
    }

    /// Returns the event's file descriptor: readable when a task is done. It lives as this does.
    pub(super) fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub(super) fn begin(&self) {
        self.lock().under_way += 1;
    }

    /// Takes note of the answers of a task, and signals the event.
    pub(super) fn end(&self, task: TaskId, answers: Vec<T>) {
        let mut state = self.lock();
        state.under_way = state.under_way.saturating_sub(1);
        state.done.insert(task, answers);
        if state.done.len() > WAITING_MAX {
            state.done.pop_first();
        }
        drop(state);
        self.ended.notify_all();
        // It refuses only at a count of 2^64 - 1, which is readable already.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Takes the answers of a task that is done.
    pub(super) fn take(&self, task: TaskId) -> Option<Vec<T>> {
        self.lock().done.remove(&task)
    }

    /// Takes the answers of all tasks that are done, oldest first.
    pub(super) fn take_all(&self) -> Vec<(TaskId, Vec<T>)> {
        std::mem::take(&mut self.lock().done).into_iter().collect()
    }

    /// Takes the answers of a task, waiting for them.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after `limit`; they can be taken later.
    pub(super) fn wait(&self, task: TaskId, limit: Duration) -> Result<Vec<T>> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(answers) = state.done.remove(&task) {
                return Ok(answers);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                let message = format!("not done within {:.3} s", limit.as_secs_f64());
                return Err(Error::new(ErrorKind::TimedOut, message));
            }
            let waited = self.ended.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until no task is under way; returns whether that came before `deadline`.
    pub(super) fn wait_for_all(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        while state.under_way > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let waited = self.ended.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(results: &Results<bool>) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&results.event, &mut count).is_ok()
    }

    #[test]
    fn an_end_is_signalled_and_taken_once() {
        let results = Results::new().unwrap();
        assert!(!readable(&results));
        results.begin();
        assert!(!results.wait_for_all(Instant::now()));
        results.end(7, vec![true, false]);
        assert!(readable(&results) && results.wait_for_all(Instant::now()));
        assert_eq!(results.take(7), Some(vec![true, false]));
        assert_eq!(results.take(7), None);
        let error = results.wait(7, Duration::from_millis(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        results.end(8, vec![true]);
        assert_eq!(results.wait(8, Duration::ZERO).unwrap(), [true]);
    }

    #[test]
    fn answers_that_nobody_takes_have_a_bound_and_the_oldest_go() {
        let results = Results::new().unwrap();
        for task in 0..=WAITING_MAX as TaskId {
            results.end(task, vec![true]);
        }
        assert_eq!(results.take(0), None);
        let all = results.take_all();
        assert_eq!((all.len(), all[0].0), (WAITING_MAX, 1));
    }
}
