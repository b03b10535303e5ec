//! Streams and events, which order streams as in CUDA. When work runs is a matter of `pace`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvrail_cuda::{Pages, PieceGrid};
use mock_script::Action;

use crate::{pace, work};

/// `CU_STREAM_PER_THREAD`; null and 1 are the legacy default stream.
const PER_THREAD_DEFAULT: usize = 2;

/// One piece of work on a stream.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// A copy; either end may be device memory.
    Copy {
        action: Option<Action>,
        target: u64,
        source: u64,
        bytes: usize,
    },
    /// A launch of `kvrail_copy`.
    CopyKernel {
        action: Option<Action>,
        descriptors: u64,
        number: usize,
    },
    /// A launch of `kvrail_hash_pages`.
    HashKernel {
        action: Option<Action>,
        descriptors: u64,
        number: usize,
        hashes: u64,
    },
    /// A launch of a kernel that copies pieces to pages, or from there, and hashes the pages.
    PagesKernel {
        action: Option<Action>,
        gathers: bool,
        pieces: Pieces,
        pages: Pages,
        /// The last argument: the number of entries, or where the number of a bad page goes.
        last: u64,
    },
    /// The point of an event's nth recording.
    Record(usize, u64),
    /// What follows waits for an event's nth recording.
    Wait(usize, u64),
}

/// Where a kernel finds its pieces.
#[derive(Debug, Clone)]
pub(crate) enum Pieces {
    /// Descriptors in device memory.
    List { descriptors: u64, number: usize },
    /// An argument of the launch.
    Grid(Box<PieceGrid>),
}

#[derive(Debug, Default, Clone, Copy)]
struct Event {
    stream: usize,
    recorded: u64,
    done: u64,
    /// When the stream passed it.
    passed: Option<Instant>,
}

/// All streams and events, by handle.
#[derive(Debug)]
pub(crate) struct Streams {
    queues: BTreeMap<usize, VecDeque<Work>>,
    events: BTreeMap<usize, Event>,
    /// The device of each stream and event that is alive, by handle.
    owners: BTreeMap<usize, usize>,
    /// The events that know when they were passed.
    timed: BTreeSet<usize>,
    next: usize,
    /// The first error of work that ran; as in CUDA, whoever waits next learns of it.
    error: c_int,
}

static STREAMS: Mutex<Streams> = Mutex::new(Streams {
    queues: BTreeMap::new(),
    events: BTreeMap::new(),
    owners: BTreeMap::new(),
    timed: BTreeSet::new(),
    next: 16,
    error: 0,
});

pub(crate) fn streams() -> MutexGuard<'static, Streams> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// Returns a handle that nobody had, for a stream or an event of a device.
    pub(crate) fn handle(&mut self, device: usize) -> usize {
        self.next += 16;
        self.owners.insert(self.next, device);
        self.next
    }

    /// Returns the handle of a new event.
    pub(crate) fn event(&mut self, device: usize, timed: bool) -> usize {
        let event = self.handle(device);
        if timed {
            self.timed.insert(event);
        }
        event
    }

    /// Returns whether an event knows when it was passed.
    pub(crate) fn is_timed(&self, event: usize) -> bool {
        self.timed.contains(&event)
    }

    /// Forgets a handle; returns whether there was such a thing.
    pub(crate) fn forget(&mut self, handle: usize) -> bool {
        self.timed.remove(&handle);
        self.owners.remove(&handle).is_some()
    }

    /// Returns whether a stream or an event is alive and may be used while `device` is the current
    /// context's. The default streams are those of any.
    pub(crate) fn is_of(&self, handle: usize, device: usize) -> bool {
        handle <= PER_THREAD_DEFAULT || self.owners.get(&handle) == Some(&device)
    }

    /// Returns whether an event is alive; any context may ask for it and wait for it.
    pub(crate) fn is_event(&self, handle: usize) -> bool {
        self.owners.contains_key(&handle)
    }

    pub(crate) fn push(&mut self, stream: usize, work: Work) {
        pace::start();
        self.queues.entry(stream).or_default().push_back(work);
    }

    pub(crate) fn record(&mut self, event: usize, stream: usize) {
        let state = self.events.entry(event).or_default();
        state.recorded += 1;
        state.stream = stream;
        let recorded = state.recorded;
        self.push(stream, Work::Record(event, recorded));
    }

    pub(crate) fn wait(&mut self, stream: usize, event: usize) {
        let recorded = self.events.get(&event).map_or(0, |state| state.recorded);
        self.push(stream, Work::Wait(event, recorded));
    }

    /// Runs all that is on a stream; returns the error of work so far.
    pub(crate) fn finish(&mut self, stream: usize) -> c_int {
        while let Some(next) = self.queues.get_mut(&stream).and_then(VecDeque::pop_front) {
            self.run(next);
        }
        std::mem::take(&mut self.error)
    }

    /// Returns whether an event's last recording is passed, with the error of work so far; where
    /// work waits for somebody to wait for it, this is that.
    pub(crate) fn query(&mut self, event: usize) -> Option<c_int> {
        let is_passed = |event: &Event| event.done >= event.recorded;
        if pace::is_own() && !self.events.get(&event).is_none_or(is_passed) {
            return None;
        }
        Some(self.finish_event(event))
    }

    /// Runs one piece of work, the next of a stream that does not wait; `drawn` says of which.
    pub(crate) fn advance(&mut self, drawn: u64) {
        let is_blocked = |work: &Work| match work {
            Work::Wait(event, recorded) => {
                let state = self.events.get(event);
                state.is_some_and(|state| state.done < *recorded)
            }
            _ => false,
        };
        let ready: Vec<usize> = self
            .queues
            .iter()
            .filter(|(_, queue)| queue.front().is_some_and(|work| !is_blocked(work)))
            .map(|(stream, _)| *stream)
            .collect();
        let Some(picked) = (drawn as usize).checked_rem(ready.len()) else {
            return;
        };
        let queue = ready
            .get(picked)
            .and_then(|stream| self.queues.get_mut(stream));
        if let Some(next) = queue.and_then(VecDeque::pop_front) {
            self.run(next);
        }
    }

    /// Runs until an event's last recording is passed.
    pub(crate) fn finish_event(&mut self, event: usize) -> c_int {
        let recorded = self.events.get(&event).map_or(0, |state| state.recorded);
        self.reach(event, recorded);
        std::mem::take(&mut self.error)
    }

    /// Returns the milliseconds between two events that were passed.
    pub(crate) fn elapsed(&self, from: usize, to: usize) -> Option<f32> {
        let passed = |event| self.events.get(&event)?.passed;
        let (from, to) = (passed(from)?, passed(to)?);
        Some(to.saturating_duration_since(from).as_secs_f32() * 1e3)
    }

    /// Runs everything.
    pub(crate) fn finish_all(&mut self) {
        let streams: Vec<usize> = self.queues.keys().copied().collect();
        for stream in streams {
            while let Some(next) = self.queues.get_mut(&stream).and_then(VecDeque::pop_front) {
                self.run(next);
            }
        }
    }

    /// Forgets a stream; as in CUDA, what is on it is still done.
    pub(crate) fn forget_stream(&mut self, stream: usize) {
        if !pace::is_own() {
            self.finish(stream);
            self.queues.remove(&stream);
        }
    }

    fn reach(&mut self, event: usize, recorded: u64) {
        while let Some(state) = self.events.get(&event).copied() {
            if state.done >= recorded {
                return;
            }
            let queue = self.queues.get_mut(&state.stream);
            match queue.and_then(VecDeque::pop_front) {
                Some(next) => self.run(next),
                // An earlier recording on another stream: nothing is left to wait for.
                None => return,
            }
        }
    }

    fn run(&mut self, next: Work) {
        let code = match next {
            Work::Record(event, recorded) => {
                let state = self.events.entry(event).or_default();
                state.done = state.done.max(recorded);
                state.passed = Some(Instant::now());
                0
            }
            Work::Wait(event, recorded) => {
                self.reach(event, recorded);
                0
            }
            other => work::perform(other),
        };
        if self.error == 0 {
            self.error = code;
        }
    }
}
