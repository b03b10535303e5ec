//! Transfers between a file and pieces of registered GPU memory, in place.

use std::ops::Range;
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

/// The caller's end of a transfer in flight. Dropping it does not end the transfer.
#[derive(Debug)]
pub struct PieceHandle {
    receiver: Receiver<Result<()>>,
}

/// The engine's end.
#[derive(Debug)]
pub(super) struct PieceCompletion {
    sender: Sender<Result<()>>,
}

impl PieceHandle {
    pub(super) fn pair() -> (PieceCompletion, Self) {
        let (sender, receiver) = bounded(1);
        (PieceCompletion { sender }, Self { receiver })
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

impl PieceCompletion {
    /// Ends the transfer. A caller that no longer waits is no error.
    pub(super) fn complete(self, result: Result<()>) {
        drop(self.sender.send(result));
    }
}
