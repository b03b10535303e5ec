//! The two ends of a request in flight.

use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Arena, HostArena, StagingRange};

/// The caller's end: gives the buffer back when the request is done.
///
/// Dropping it leaves the buffer to the engine, which gives it to the pool when it is through.
#[derive(Debug)]
pub struct IoHandle<A: Arena = HostArena> {
    receiver: Receiver<Result<StagingRange<A>>>,
}

/// The engine's end: completes the request exactly once.
#[derive(Debug)]
pub struct Completion<A: Arena = HostArena> {
    sender: Sender<Result<StagingRange<A>>>,
}

impl<A: Arena> IoHandle<A> {
    /// Makes the two ends of one request.
    pub fn pair() -> (Completion<A>, Self) {
        let (sender, receiver) = bounded(1);
        (Completion { sender }, Self { receiver })
    }

    /// Waits until the request is done and returns its buffer.
    ///
    /// # Errors
    /// The engine's error, or [`ErrorKind::TimedOut`] at the deadline: the request goes on, and
    /// its memory stays with the engine.
    pub fn wait(self, deadline: Instant) -> Result<StagingRange<A>> {
        match self.receiver.recv_deadline(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(Error::new(
                ErrorKind::TimedOut,
                "file system did not answer in time",
            )),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::new(ErrorKind::Closed, "I/O engine stopped"))
            }
        }
    }
}

impl<A: Arena> Completion<A> {
    /// Ends the request. A caller that no longer waits is no error: the buffer goes to its pool.
    pub fn complete(self, result: Result<StagingRange<A>>) {
        drop(self.sender.send(result));
    }
}
