//! Staging buffers that nobody waits for any more and a GPU still writes to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvrail_cuda::Event;

use super::pinned::REFUSALS_MAX;
use crate::memory::StagingRange;

/// How long the thread sleeps between two looks at a GPU that is not there yet: nobody waits for a
/// buffer in particular, and vLLM launches its kernels meanwhile.
const POLL: Duration = Duration::from_millis(2);

/// Gives buffers back when the GPU has let go of them.
///
/// A store may end before its copy has begun: the chunk is there already, the path is out of use, or
/// the forwards in front of the copy take longer than a store waits. Its buffer must not be
/// anybody else's until the copy is over, and must come back then, or stores end for want of buffers.
#[derive(Debug, Default)]
pub(in crate::store) struct LateBuffers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    buffers: VecDeque<(Arc<Event>, StagingRange)>,
    has_thread: bool,
}

impl LateBuffers {
    /// Keeps a buffer until `event` is done. Waits for nothing.
    pub(in crate::store) fn keep(self: &Arc<Self>, event: Arc<Event>, buffer: StagingRange) {
        let mut state = self.lock();
        state.buffers.push_back((event, buffer));
        if state.has_thread {
            return;
        }
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name("kvrail-late".to_owned());
        // Without a thread they stay until the next one comes.
        state.has_thread = thread.spawn(move || shared.give_back()).is_ok();
    }

    fn give_back(&self) {
        while let Some((event, buffer)) = self.next() {
            if wait(&event) {
                drop(buffer);
            } else {
                // The GPU may still write there: lost rather than given to another.
                std::mem::forget(buffer);
            }
        }
    }

    fn next(&self) -> Option<(Arc<Event>, StagingRange)> {
        let mut state = self.lock();
        let next = state.buffers.pop_front();
        state.has_thread = next.is_some();
        next
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits as long as it takes; returns whether the event is known to be done.
fn wait(event: &Event) -> bool {
    let mut refusals = 0;
    while refusals < REFUSALS_MAX {
        match event.is_done() {
            Ok(true) => return true,
            Ok(false) => refusals = 0,
            Err(_) => refusals += 1,
        }
        thread::sleep(POLL);
    }
    false
}
