//! The two ends of a request in flight.

use std::fmt;
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Arena, HostArena, StagingRange};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// The caller's end: gives the buffer back when the request is done.
///
/// Dropping it leaves the buffer to the engine, which gives it to the pool when it is through.
#[derive(Debug)]
pub struct IoHandle<A: Arena = HostArena> {
    pending: Pending<A>,
}

/// Who brings the request to its end.
#[derive(Debug)]
enum Pending<A: Arena> {
    /// A thread of the engine.
    Engine(Waiting<A>),
    /// The caller itself, while it waits.
    Caller(Box<dyn Driven<A>>),
}

/// A request that goes on in the kernel by itself and whose end its caller has to take from there.
pub(super) trait Driven<A: Arena>: fmt::Debug + Send {
    /// Waits until the request is done, or until the deadline.
    fn wait(self: Box<Self>, deadline: Instant) -> Result<StagingRange<A>>;
}

#[derive(Debug)]
struct Waiting<A: Arena> {
    receiver: Receiver<Result<StagingRange<A>>>,
    given_up: Arc<AtomicBool>,
}

/// The engine's end: completes the request exactly once.
#[derive(Debug)]
pub struct Completion<A: Arena = HostArena> {
    sender: Sender<Result<StagingRange<A>>>,
    given_up: Arc<AtomicBool>,
}

impl<A: Arena> IoHandle<A> {
    /// Makes the two ends of one request.
    pub fn pair() -> (Completion<A>, Self) {
        let (sender, receiver) = bounded(1);
        let given_up = Arc::new(AtomicBool::new(false));
        let completion = Completion {
            sender,
            given_up: Arc::clone(&given_up),
        };
        let pending = Pending::Engine(Waiting { receiver, given_up });
        (completion, Self { pending })
    }

    /// Makes the caller's end of a request that its caller drives.
    pub(super) fn driven(driven: Box<dyn Driven<A>>) -> Self {
        let pending = Pending::Caller(driven);
        Self { pending }
    }

    /// Waits until the request is done and returns its buffer.
    ///
    /// # Errors
    /// The engine's error, or [`ErrorKind::TimedOut`] at the deadline: the request goes on, and
    /// its memory stays with the engine.
    pub fn wait(self, deadline: Instant) -> Result<StagingRange<A>> {
        let waiting = match self.pending {
            Pending::Engine(waiting) => waiting,
            Pending::Caller(driven) => return driven.wait(deadline),
        };
        match waiting.receiver.recv_deadline(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(no_answer()),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::new(ErrorKind::Closed, "I/O engine stopped"))
            }
        }
    }
}

/// The error of a request that is not done at its deadline.
pub(super) fn no_answer() -> Error {
    // The cause tells it from waits for anything but the file system.
    Error::new(ErrorKind::TimedOut, "file system did not answer in time")
        .with_source(std::io::Error::from(std::io::ErrorKind::TimedOut))
}

impl<A: Arena> Drop for Waiting<A> {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Release);
    }
}

impl<A: Arena> Completion<A> {
    /// Returns a view of whether the caller has gone. A request that has not begun by then need
    /// not be done, and one that does not end keeps its thread from others.
    pub fn given_up(&self) -> GivenUp {
        GivenUp(Arc::clone(&self.given_up))
    }

    /// Ends the request. A caller that no longer waits is no error: the buffer goes to its pool.
    pub fn complete(self, result: Result<StagingRange<A>>) {
        drop(self.sender.send(result));
    }
}

/// Whether the caller of a request has gone, for the engine that performs it.
#[derive(Debug, Clone)]
pub struct GivenUp(Arc<AtomicBool>);

impl GivenUp {
    /// Returns whether nobody waits for the request any more.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
