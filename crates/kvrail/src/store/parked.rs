//! Loads that must not end yet: cuFile has not let go of their blocks.

use std::time::{Duration, Instant};

use super::load_job::LoadJob;
use super::queue::TransferQueue;
use crate::io::PieceHandle;
use crate::sync::thread;
use crate::sync::{Arc, Mutex, PoisonError};

/// How long one wait lasts; there is no limit to all of them together.
const WAIT: Duration = Duration::from_secs(3600);

/// Transfers into blocks of a KV cache that did not return in time.
#[derive(Debug)]
pub(super) struct Parked {
    handles: Vec<PieceHandle>,
}

impl Parked {
    pub(super) fn new(handles: Vec<PieceHandle>) -> Self {
        Self { handles }
    }

    /// Waits on a thread of its own, without limit, then puts the load back into the queue.
    ///
    /// Each costs a thread. There are as many at most as cuFile has threads that hang, since the
    /// path is left to POSIX after the first.
    pub(super) fn wait_then_give_back(self, queue: &Arc<TransferQueue>, mut job: Box<LoadJob>) {
        let queue = Arc::clone(queue);
        // The wait is cuFile's; POSIX gets its own time.
        job.started = None;
        let wait = move || {
            for handle in &self.handles {
                while handle.wait(Instant::now() + WAIT).is_none() {}
            }
            // It had its turn already, so the second one does not come too late.
            job.submitted = Instant::now();
            queue.give_back(job);
        };
        // Without a thread for it the closure, and the job in it, must not be dropped: that would
        // end the load. This thread waits then.
        let shared = Arc::new(Mutex::new(Some(wait)));
        let run = {
            let shared = Arc::clone(&shared);
            move || run_once(&shared)
        };
        let thread = thread::Builder::new().name("kvrail-parked".to_owned());
        if thread.spawn(run).is_err() {
            run_once(&shared);
        }
    }
}

fn run_once(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}
