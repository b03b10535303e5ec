//! The chunks of one call: counts down to the report.
//!
//! Every chunk ends exactly once; one whose job is dropped (store closed, worker panicked) ends
//! as failed, so no ticket stays open.

use super::ticket::{Issuer, LoadReport, LoadTicket, StoreReport, StoreTicket, Ticket};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, PoisonError};

/// How a chunk of a call ended.
#[derive(Debug)]
pub(super) enum Ending {
    Stored,
    AlreadyPresent,
    Dropped,
    Loaded,
    Failed(String),
}

/// A report that is put together from endings.
pub(super) trait Report: Clone + Default + Send {
    fn add(&mut self, index: usize, ending: Ending);
}

impl Report for StoreReport {
    fn add(&mut self, _index: usize, ending: Ending) {
        match ending {
            Ending::Stored => self.stored += 1,
            Ending::AlreadyPresent => self.already_present += 1,
            Ending::Dropped => self.dropped += 1,
            Ending::Failed(_) | Ending::Loaded => self.failed += 1,
        }
    }
}

impl Report for LoadReport {
    fn add(&mut self, index: usize, ending: Ending) {
        let error = match ending {
            Ending::Loaded => {
                self.loaded += 1;
                return;
            }
            Ending::Failed(error) => error,
            other => format!("{other:?}"),
        };
        // Workers end chunks in any order; reports list them ascending.
        let position = self.failed.partition_point(|failed| *failed < index);
        self.failed.insert(position, index);
        self.errors.insert(position, error);
    }
}

/// The chunks of one call.
#[derive(Debug)]
pub(super) struct Batch<R> {
    state: Mutex<(usize, R)>,
    issuer: Issuer<R>,
}

/// One chunk of a batch, to be ended once: by whoever works on it, or by the watch.
#[derive(Debug)]
pub(super) struct Member<R: Report> {
    chunk: Arc<Chunk<R>>,
}

#[derive(Debug)]
struct Chunk<R: Report> {
    batch: Arc<Batch<R>>,
    index: usize,
    ended: AtomicBool,
}

impl<R: Report> Batch<R> {
    /// Makes a ticket and a member for each of `count` chunks. Without chunks it is done at once.
    pub(super) fn start(count: usize) -> (Ticket<R>, Vec<Member<R>>) {
        let (issuer, ticket) = Ticket::issue();
        if count == 0 {
            issuer.complete(R::default());
        }
        let batch = Arc::new(Self {
            state: Mutex::new((count, R::default())),
            issuer,
        });
        let member = |index| Member {
            chunk: Arc::new(Chunk {
                batch: Arc::clone(&batch),
                index,
                ended: AtomicBool::new(false),
            }),
        };
        (ticket, (0..count).map(member).collect())
    }
}

impl<R: Report> Member<R> {
    /// Ends the chunk, unless it has ended.
    pub(super) fn end(self, ending: Ending) {
        self.chunk.finish(ending);
    }

    /// Returns a second hold of the chunk; the first that ends it decides how.
    pub(super) fn share(&self) -> Self {
        Self {
            chunk: Arc::clone(&self.chunk),
        }
    }
}

impl<R: Report> Chunk<R> {
    fn finish(&self, ending: Ending) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut state = self
            .batch
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.1.add(self.index, ending);
        state.0 -= 1;
        if state.0 == 0 {
            self.batch.issuer.complete(state.1.clone());
        }
    }
}

impl<R: Report> Drop for Chunk<R> {
    fn drop(&mut self) {
        self.finish(Ending::Failed(
            "the store was closed or lost its threads before this chunk was done".into(),
        ));
    }
}

/// Starts the batch of a load.
pub(super) fn start_load(count: usize) -> (LoadTicket, Vec<Member<LoadReport>>) {
    Batch::start(count)
}

/// Starts the batch of a store.
pub(super) fn start_store(count: usize) -> (StoreTicket, Vec<Member<StoreReport>>) {
    Batch::start(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_member_ends_as_failed_and_failures_are_in_order() {
        let (ticket, mut members) = start_load(4);
        let last = members.pop().unwrap();
        members.pop().unwrap().end(Ending::Loaded);
        last.end(Ending::Failed("three".into()));
        assert_eq!(ticket.poll(), None);
        drop(members);
        let report = ticket.poll().unwrap();
        assert_eq!((report.loaded, report.failed), (1, vec![0, 1, 3]));
        assert_eq!(report.errors[2], "three");
    }

    #[test]
    fn an_empty_batch_is_done() {
        assert_eq!(start_store(0).0.poll(), Some(StoreReport::default()));
    }
}
