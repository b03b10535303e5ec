//! Tickets: what a caller holds while the store works.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The answer to come of a lookup: the number of leading chunks present.
pub type LookupTicket = Ticket<usize>;
/// The answer to come of a lookup of each of several chunks: which are present, in their order.
pub type PresenceTicket = Ticket<Vec<bool>>;
/// The report to come of a store.
pub type StoreTicket = Ticket<StoreReport>;
/// The report to come of a load.
pub type LoadTicket = Ticket<LoadReport>;

/// What became of the chunks of one call of `store`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Chunks written and published.
    pub stored: usize,
    /// Chunks that were there already, or are being written.
    pub already_present: usize,
    /// Chunks given up for want of staging memory, space, or a path that is well.
    pub dropped: usize,
    /// Chunks that failed with an error.
    pub failed: usize,
}

/// What became of the chunks of one call of `load`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Chunks verified and copied to the KV cache.
    pub loaded: usize,
    /// Indices of the chunks that were not, ascending: their blocks hold no valid KV.
    pub failed: Vec<usize>,
    /// Why, one for each of `failed`.
    pub errors: Vec<String>,
}

/// A result that comes later. Dropping it changes nothing about the work.
#[derive(Debug)]
pub struct Ticket<T> {
    shared: Arc<Shared<T>>,
}

/// The store's end of a ticket.
#[derive(Debug)]
pub(super) struct Issuer<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

struct State<T> {
    value: Option<T>,
    /// What is called with the result.
    told: Option<Box<dyn FnOnce(T) + Send>>,
}

impl<T: fmt::Debug> fmt::Debug for State<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("value", &self.value)
            .finish_non_exhaustive()
    }
}

impl<T: Clone> Ticket<T> {
    pub(super) fn issue() -> (Issuer<T>, Self) {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                value: None,
                told: None,
            }),
            arrived: Condvar::new(),
        });
        (
            Issuer {
                shared: Arc::clone(&shared),
            },
            Self { shared },
        )
    }

    /// Returns the result if it is there.
    pub fn poll(&self) -> Option<T> {
        self.shared.lock().value.clone()
    }

    /// Has `tell` called with the result: now if it is there, else by the thread that brings it.
    ///
    /// That thread works for others, too, so `tell` must be quick. A later call replaces an earlier
    /// one that was not called yet.
    pub(super) fn tell(&self, tell: impl FnOnce(T) + Send + 'static) {
        let mut state = self.shared.lock();
        match state.value.clone() {
            Some(value) => {
                drop(state);
                tell(value);
            }
            None => state.told = Some(Box::new(tell)),
        }
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after `limit`; the work goes on and the ticket stays good.
    pub fn wait(&self, limit: Duration) -> Result<T> {
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.shared.lock();
        loop {
            if let Some(value) = state.value.as_ref() {
                return Ok(value.clone());
            }
            let left = deadline.map_or(Duration::from_secs(3600), |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left == Duration::ZERO {
                let message = format!("not done within {:.3} s", limit.as_secs_f64());
                return Err(Error::new(ErrorKind::TimedOut, message));
            }
            let waited = self.shared.arrived.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Issuer<T> {
    /// Gives the result to whoever holds the ticket.
    pub(super) fn complete(&self, value: T) {
        let mut state = self.shared.lock();
        let told = state.told.take().map(|tell| (tell, value.clone()));
        state.value = Some(value);
        self.shared.arrived.notify_all();
        drop(state);
        if let Some((tell, value)) = told {
            tell(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_bounded_and_the_ticket_stays_good() {
        let (issuer, ticket) = LookupTicket::issue();
        assert_eq!(ticket.poll(), None);
        let error = ticket.wait(Duration::from_millis(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ticket.wait(Duration::from_secs(20)).unwrap());
            issuer.complete(3);
            assert_eq!(waiting.join().unwrap(), 3);
        });
        assert_eq!(ticket.poll(), Some(3));
        assert_eq!(ticket.wait(Duration::ZERO).unwrap(), 3);
    }

    #[test]
    fn the_result_is_told_once_whether_it_is_there_already_or_comes() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = |name| {
            let told = Arc::clone(&told);
            move |value| told.lock().unwrap().push((name, value))
        };
        let (issuer, ticket) = LookupTicket::issue();
        ticket.tell(tell("early"));
        assert!(told.lock().unwrap().is_empty());
        issuer.complete(3);
        ticket.tell(tell("late"));
        drop((issuer, ticket));
        assert_eq!(*told.lock().unwrap(), [("early", 3), ("late", 3)]);
    }
}
