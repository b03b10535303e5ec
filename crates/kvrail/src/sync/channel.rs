//! A bounded channel of a model, with the interface of crossbeam-channel.
//!
//! crossbeam's own steps are not modelled: that it loses nothing and wakes whom it must is taken
//! for granted. What the library builds on it is.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use crossbeam_channel::{RecvTimeoutError, SendError, TryRecvError, TrySendError};
use shuttle::sync::{Condvar, Mutex, MutexGuard};
use shuttle::thread;

use super::lock::SHORT;

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    bound: usize,
}

struct State<T> {
    waiting: VecDeque<T>,
    senders: usize,
    receivers: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`crossbeam_channel::Sender`].
pub(crate) struct Sender<T>(Arc<Shared<T>>);

/// See [`crossbeam_channel::Receiver`].
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

/// See [`crossbeam_channel::bounded`]. One without room is for the news that an end is gone.
pub(crate) fn bounded<T>(bound: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            waiting: VecDeque::new(),
            senders: 1,
            receivers: 1,
        }),
        changed: Condvar::new(),
        bound,
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    pub(crate) fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        let mut state = self.0.lock();
        if state.receivers == 0 {
            return Err(TrySendError::Disconnected(value));
        }
        if state.waiting.len() >= self.0.bound {
            return Err(TrySendError::Full(value));
        }
        state.waiting.push_back(value);
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }

    /// Sends what there is room for; the library never sends more.
    pub(crate) fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.try_send(value)
            .map_err(|error| SendError(error.into_inner()))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

impl<T> Receiver<T> {
    /// Waits for a value as long as `may_wait` says so; looks once at least.
    fn receive(&self, may_wait: impl Fn() -> Option<bool>) -> Result<T, RecvTimeoutError> {
        let mut state = self.0.lock();
        loop {
            if let Some(value) = state.waiting.pop_front() {
                return Ok(value);
            }
            if state.senders == 0 {
                return Err(RecvTimeoutError::Disconnected);
            }
            state = match may_wait() {
                None => return Err(RecvTimeoutError::Timeout),
                Some(true) => {
                    let waited = self.0.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
                Some(false) => {
                    drop(state);
                    thread::yield_now();
                    self.0.lock()
                }
            };
        }
    }

    pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
        self.receive(|| None).map_err(|_| TryRecvError::Empty)
    }

    /// Waits until something comes, or until a short time is over.
    pub(crate) fn recv_deadline(&self, deadline: Instant) -> Result<T, RecvTimeoutError> {
        self.receive(|| {
            let left = deadline.saturating_duration_since(Instant::now());
            (left > Duration::ZERO).then_some(left > SHORT)
        })
    }

    pub(crate) fn recv_timeout(&self, limit: Duration) -> Result<T, RecvTimeoutError> {
        self.recv_deadline(Instant::now() + limit)
    }
}

impl<T> Iterator for &Receiver<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.receive(|| Some(true)).ok()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.0.lock().receivers += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.lock().senders -= 1;
        self.0.changed.notify_all();
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.receivers -= 1;
        let left = (state.receivers == 0).then(|| std::mem::take(&mut state.waiting));
        drop(state);
        // Dropped without the lock, as values may hold the other end of other channels.
        drop(left);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Sender")
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Receiver")
    }
}
