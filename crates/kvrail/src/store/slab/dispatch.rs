//! A thread that works on tasks in their order.

use crate::error::{Error, ErrorKind, Result};
use crate::sync::channel::{Sender, bounded};
use crate::sync::{Arc, Mutex, PoisonError, thread};

/// Tasks that may wait for a thread; one more is answered with misses. A task is what a serving
/// cache asks for at once, a prompt's objects, so more than a few is a thread that hangs.
const TASKS_MAX: usize = 1024;

/// A thread with a bounded queue; it ends when this is closed or dropped, after what waits.
#[derive(Debug)]
pub(super) struct Dispatch<J> {
    queue: Mutex<Option<Sender<J>>>,
}

impl<J: Send + 'static> Dispatch<J> {
    /// Starts the thread: `on_start` first, then `work` for each job.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] when the system gives no thread.
    pub(super) fn start(
        name: &str,
        on_start: &Arc<dyn Fn() + Send + Sync>,
        work: impl Fn(J) + Send + 'static,
    ) -> Result<Self> {
        let (queue, jobs) = bounded(TASKS_MAX);
        let on_start = Arc::clone(on_start);
        let body = move || {
            on_start();
            for job in &jobs {
                work(job);
            }
        };
        let thread = thread::Builder::new().name(format!("kvrail-{name}"));
        thread.spawn(body).map_err(|source| {
            Error::new(ErrorKind::Closed, "a thread for tasks could not be started")
                .with_source(source)
        })?;
        Ok(Self {
            queue: Mutex::new(Some(queue)),
        })
    }

    /// Hands over a job. Returns whether it was taken: not when the queue is full or closed.
    pub(super) fn send(&self, job: J) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue
            .as_ref()
            .is_some_and(|queue| queue.try_send(job).is_ok())
    }

    /// Takes no more jobs.
    pub(super) fn close(&self) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}
