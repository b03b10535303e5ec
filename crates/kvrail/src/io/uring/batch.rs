//! Requests that were submitted together, and the ring that they are in.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ring::{Ended, Ring};
use super::rings::Rings;
use crate::error::{Error, ErrorKind, Result};
use crate::io::IoRequest;
use crate::io::handle::{Driven, no_answer};
use crate::memory::{HostArena, StagingRange};

/// How long one waiter keeps the ring before it looks whether another one has waited for it.
const TURN: Duration = Duration::from_millis(50);

/// A batch. Its ring goes back when the last of its handles is gone.
#[derive(Debug)]
pub(super) struct Batch {
    state: Mutex<State>,
    rings: Arc<Rings>,
}

#[derive(Debug)]
struct State {
    /// `None` only while the batch is dropped.
    ring: Option<Ring>,
    /// What the ring has no room for yet, by the number in the batch.
    waiting: VecDeque<(usize, IoRequest)>,
    /// What has ended and was not taken yet.
    ended: Vec<Option<Result<StagingRange>>>,
    /// Why the ring cannot be used any more.
    broken: Option<Error>,
}

/// The caller's end of one request of a batch.
#[derive(Debug)]
pub(super) struct Part {
    batch: Arc<Batch>,
    number: usize,
}

impl Batch {
    /// Starts as many of the requests as there is room for; the others follow.
    pub(super) fn start(rings: &Arc<Rings>, ring: Ring, requests: Vec<IoRequest>) -> Vec<Part> {
        let count = requests.len();
        let mut state = State {
            ring: Some(ring),
            waiting: requests.into_iter().enumerate().collect(),
            ended: (0..count).map(|_| None).collect(),
            broken: None,
        };
        state.fill();
        let batch = Arc::new(Self {
            state: Mutex::new(state),
            rings: Arc::clone(rings),
        });
        (0..count)
            .map(|number| Part {
                batch: Arc::clone(&batch),
                number,
            })
            .collect()
    }
}

impl State {
    /// Puts what waits into the ring, as far as there is room, and tells the kernel.
    fn fill(&mut self) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        while let Some((number, request)) = self.waiting.pop_front() {
            if let Err(request) = ring.start(number, request) {
                self.waiting.push_front((number, request));
                break;
            }
        }
        if let Err(error) = ring.submit() {
            self.broken.get_or_insert(error);
        }
    }

    /// Drives the ring until something ends or `deadline`.
    fn drive(&mut self, deadline: Instant) {
        let mut ended: Vec<Ended> = Vec::new();
        let Some(ring) = &mut self.ring else {
            return;
        };
        if let Err(error) = ring.wait(deadline, &mut ended) {
            self.broken.get_or_insert(error);
        }
        let (any, is_idle) = (!ended.is_empty(), ring.in_flight() == 0);
        for (number, result) in ended {
            if let Some(place) = self.ended.get_mut(number) {
                *place = Some(result);
            }
        }
        if (any || is_idle) && !self.waiting.is_empty() {
            self.fill();
        }
    }

    fn take(&mut self, number: usize) -> Option<Result<StagingRange>> {
        let ended = self.ended.get_mut(number).and_then(Option::take);
        let broken = self.broken.as_ref();
        ended.or_else(|| broken.map(|error| Err(Error::new(error.kind(), error.to_string()))))
    }
}

impl Driven<HostArena> for Part {
    /// Drives the ring until this request has ended. Handles of one batch are for one thread; a
    /// second one may have to wait for the first.
    fn wait(self: Box<Self>, deadline: Instant) -> Result<StagingRange> {
        loop {
            let mut state = self
                .batch
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(result) = state.take(self.number) {
                return result;
            }
            let now = Instant::now();
            state.drive(deadline.min(now + TURN));
            if let Some(result) = state.take(self.number) {
                return result;
            }
            if now >= deadline {
                return Err(no_answer());
            }
            if state.ring.as_ref().is_none_or(|ring| ring.in_flight() == 0)
                && state.waiting.is_empty()
            {
                return Err(Error::new(ErrorKind::Closed, "the request was lost"));
            }
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Buffers of what was not begun, or has ended and was not asked for, go back.
        state.waiting.clear();
        state.ended.clear();
        match (state.ring.take(), &state.broken) {
            (Some(ring), None) => self.rings.give_back(ring),
            (Some(ring), Some(_)) => self.rings.discard(ring),
            (None, _) => {}
        }
    }
}
