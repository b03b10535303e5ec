//! Transfers between a file and pieces of registered GPU memory, in place.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use super::{IoFile, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::RegisteredRegion;
use crate::sync::Arc;
use crate::sync::channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// One transfer: pieces of memory, one behind the other in the file. It owns file and registration
/// until it is done; the contents of the pieces are the caller's to keep.
#[derive(Debug)]
pub struct PieceRequest {
    /// The direction.
    pub operation: Operation,
    /// The file, opened direct.
    pub file: Arc<IoFile>,
    /// Bytes from the file's start, a multiple of the page size.
    pub offset: u64,
    /// The memory that the pieces lie in.
    pub memory: Arc<RegisteredRegion>,
    /// Bytes from the memory's start; multiples of the page size.
    pub pieces: Vec<Range<usize>>,
}

/// No thread has it yet.
const WAITING: u8 = 0;
/// A thread has it, and has not touched the memory.
const TAKEN: u8 = 1;
/// The memory is in use.
const BEGUN: u8 = 2;
/// It never begins.
const CANCELLED: u8 = 3;

/// How far a transfer was that was cancelled before it touched any memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// No thread was free for it.
    Waiting,
    /// A thread had it, and did not get as far as the transfer itself.
    Taken,
}

/// The caller's end of a transfer in flight. Dropping it does not end the transfer.
#[derive(Debug)]
pub struct PieceHandle {
    receiver: Receiver<Result<()>>,
    state: Arc<AtomicU8>,
}

/// The engine's end.
#[derive(Debug)]
pub(super) struct PieceCompletion {
    sender: Sender<Result<()>>,
    state: Arc<AtomicU8>,
}

impl PieceHandle {
    pub(super) fn pair() -> (PieceCompletion, Self) {
        let (sender, receiver) = bounded(1);
        let state = Arc::new(AtomicU8::new(WAITING));
        let completion = PieceCompletion {
            sender,
            state: Arc::clone(&state),
        };
        (completion, Self { receiver, state })
    }

    /// Keeps a transfer that has not begun from ever touching the memory, and says how far it was;
    /// `None` when it has begun.
    pub fn cancel(&self) -> Option<Cancelled> {
        for (from, stage) in [(WAITING, Cancelled::Waiting), (TAKEN, Cancelled::Taken)] {
            if advance(&self.state, from, CANCELLED) {
                return Some(stage);
            }
        }
        None
    }

    /// Waits until the transfer is done, or returns `None` at the deadline: it goes on then, and
    /// the memory is still in use.
    pub fn wait(&self, deadline: Instant) -> Option<Result<()>> {
        match self.receiver.recv_deadline(deadline) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(Error::new(ErrorKind::Closed, "cuFile engine stopped")))
            }
        }
    }
}

fn advance(state: &AtomicU8, from: u8, to: u8) -> bool {
    state
        .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

impl PieceCompletion {
    /// Notes that a thread has the transfer now. Returns whether it is still wanted.
    pub(super) fn take(&self) -> bool {
        advance(&self.state, WAITING, TAKEN)
    }

    /// Notes that the memory is in use from now on. Returns whether the transfer is still wanted.
    pub(super) fn begin(&self) -> bool {
        advance(&self.state, TAKEN, BEGUN)
    }

    /// Ends the transfer. A caller that no longer waits is no error.
    pub(super) fn complete(self, result: Result<()>) {
        drop(self.sender.send(result));
    }
}
