//! The rings of an engine: those that are free, and those that the kernel does not give back.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::counts::Counters;
use super::refusal;
use super::ring::Ring;
use crate::error::{Error, ErrorKind, Result};
use crate::io::IoCounts;

/// Rings for each that is used at a time, when all others are lost to requests that never end.
const REPLACEMENTS_MAX: usize = 3;
/// How long the drain waits at one ring before it looks at the next.
const TURN: Duration = Duration::from_millis(20);
/// How long requests may still take when the engine is gone, before their memory is left to them.
const GRACE: Duration = Duration::from_secs(1);

/// A bounded number of rings. Each belongs to one batch of requests at a time.
///
/// A ring whose batch was given up while the kernel still has requests goes to the drain: a thread
/// that is there only as long as there are such rings, and that waits in everybody's place.
pub(super) struct Rings {
    state: Mutex<State>,
    /// Rings that are kept ready: as many as work at a time.
    ready_max: usize,
    counters: Arc<Counters>,
    on_start: Arc<dyn Fn() + Send + Sync>,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Ring>,
    /// Rings that exist, wherever they are.
    count: usize,
    draining: Vec<Ring>,
    /// Requests in the rings that are drained, those at which the drain waits now included.
    held: usize,
    has_drain: bool,
    /// When the engine was dropped.
    closed: Option<Instant>,
}

impl fmt::Debug for Rings {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        out.debug_struct("Rings")
            .field("count", &state.count)
            .field("free", &state.free.len())
            .field("held", &state.held)
            .finish_non_exhaustive()
    }
}

impl Rings {
    /// Makes one ring, so that it shows whether there can be any.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] with the reason in words when the system gives none.
    pub(super) fn new(ready_max: usize, on_start: Arc<dyn Fn() + Send + Sync>) -> Result<Self> {
        let rings = Self {
            state: Mutex::default(),
            ready_max: ready_max.max(1),
            counters: Arc::default(),
            on_start,
        };
        let first = rings.make()?;
        let mut state = rings.lock();
        state.count = 1;
        state.free.push(first);
        drop(state);
        Ok(rings)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self) -> Result<Ring> {
        Ring::new(Arc::clone(&self.counters)).map_err(|source| {
            let message = format!("no io_uring: {}", refusal(&source));
            Error::new(ErrorKind::Io, message).with_source(source)
        })
    }

    /// Returns the number of rings that are kept ready.
    pub(super) fn ready_max(&self) -> usize {
        self.ready_max
    }

    /// Takes a ring that is free, or makes one.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when all rings that there may be wait for the kernel,
    /// [`ErrorKind::Io`] when the system gives no more.
    pub(super) fn take(&self) -> Result<Ring> {
        let mut state = self.lock();
        if let Some(ring) = state.free.pop() {
            return Ok(ring);
        }
        let most = self.ready_max * (1 + REPLACEMENTS_MAX);
        if state.count >= most {
            let message = format!("all {most} rings wait for requests that do not end");
            return Err(Error::new(ErrorKind::TimedOut, message));
        }
        state.count += 1;
        drop(state);
        self.make().inspect_err(|_| self.lock().count -= 1)
    }

    /// Takes a ring back: for the next one, or to be drained.
    pub(super) fn give_back(self: &Arc<Self>, mut ring: Ring) {
        if ring.in_flight() > 0 {
            ring.cancel();
            return self.drain(ring);
        }
        let mut state = self.lock();
        if state.closed.is_some() || state.free.len() >= self.ready_max {
            state.count -= 1;
            // Which one goes is the same, unless only this one has its memory at hand.
            let mut others = state.free.iter_mut();
            let worse = others.find(|other| other.registration().is_none());
            if let Some(other) = worse.filter(|_| ring.registration().is_some()) {
                std::mem::swap(other, &mut ring);
            }
            drop(state);
            drop(ring);
            return;
        }
        state.free.push(ring);
    }

    /// Lets go a ring that cannot be used any more, with what is in it.
    pub(super) fn discard(&self, ring: Ring) {
        self.lock().count -= 1;
        drop(ring);
    }

    /// Leaves a ring to the drain, and starts that if there is none.
    fn drain(self: &Arc<Self>, ring: Ring) {
        let mut state = self.lock();
        state.held += ring.in_flight();
        state.draining.push(ring);
        if state.has_drain {
            return;
        }
        state.has_drain = true;
        drop(state);
        let rings = Arc::clone(self);
        let started = thread::Builder::new()
            .name("kvrail-drain".to_owned())
            .spawn(move || {
                (rings.on_start)();
                while rings.drain_once() {}
            });
        if started.is_err() {
            // Nobody can wait for them: their memory is lost.
            let mut state = self.lock();
            state.has_drain = false;
            state.held = 0;
            let lost = std::mem::take(&mut state.draining);
            state.count -= lost.len();
            drop(state);
            drop(lost);
        }
    }

    /// Waits a while at each ring that is drained. Returns whether there are any left.
    fn drain_once(self: &Arc<Self>) -> bool {
        let mut state = self.lock();
        let draining = std::mem::take(&mut state.draining);
        let is_late = state.closed.is_some_and(|since| since.elapsed() > GRACE);
        if draining.is_empty() {
            state.has_drain = false;
            return false;
        }
        drop(state);
        for mut ring in draining {
            let before = ring.in_flight();
            let mut ended = Vec::new();
            let broken = ring.wait(Instant::now() + TURN, &mut ended).is_err();
            // The buffers of what has ended go back to their pool here.
            drop(ended);
            ring.cancel_again();
            let left = ring.in_flight();
            let mut state = self.lock();
            state.held -= before - left;
            if left > 0 && !is_late && !broken {
                state.draining.push(ring);
            } else if left > 0 {
                state.held -= left;
                state.count -= 1;
                drop(state);
                drop(ring);
            } else {
                drop(state);
                self.give_back(ring);
            }
        }
        true
    }

    /// Lets go what is free; what comes back later goes as well.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(Instant::now);
        let free = std::mem::take(&mut state.free);
        state.count -= free.len();
        drop(state);
        drop(free);
    }

    /// Returns what was counted.
    pub(super) fn counts(&self) -> IoCounts {
        let held = self.lock().held as u64;
        self.counters.snapshot(held)
    }
}
