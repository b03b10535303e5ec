//! Threads that do the same work, and that are replaced when the file system does not let them go.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::error::{Error, ErrorKind, Result};

/// Lost threads for each that was asked for; beyond that they are not replaced any more.
const LOST_MAX: usize = 4;

/// What a thread of a crew does until there is no work any more or it was replaced.
type Body = Box<dyn Fn(&Arc<Crew>) + Send + Sync>;

/// A fixed number of threads, and those that are lost.
pub(super) struct Crew {
    name: &'static str,
    on_start: Arc<dyn Fn() + Send + Sync>,
    body: Body,
    lost_max: usize,
    lost: AtomicUsize,
    started: AtomicUsize,
}

impl fmt::Debug for Crew {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Crew")
            .field("name", &self.name)
            .field("started", &self.started)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

impl Crew {
    /// Starts `threads` threads, each of which runs `on_start` and then `body`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the system gives no thread.
    pub(super) fn start(
        name: &'static str,
        threads: usize,
        on_start: &Arc<dyn Fn() + Send + Sync>,
        body: Body,
    ) -> Result<()> {
        let crew = Arc::new(Self {
            name,
            on_start: Arc::clone(on_start),
            body,
            lost_max: threads * LOST_MAX,
            lost: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
        });
        for _ in 0..threads {
            crew.add().map_err(|source| {
                Error::new(ErrorKind::Io, format!("start a {name} thread")).with_source(source)
            })?;
        }
        Ok(())
    }

    fn add(self: &Arc<Self>) -> std::io::Result<()> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let crew = Arc::clone(self);
        thread::Builder::new()
            .name(format!("kvrail-{}-{number}", self.name))
            .spawn(move || {
                (crew.on_start)();
                (crew.body)(&crew);
            })
            .map(drop)
    }

    /// Starts a thread for one that is lost; `false` when there are too many of them.
    pub(super) fn replace(self: &Arc<Self>) -> bool {
        let more = |lost| (lost < self.lost_max).then_some(lost + 1);
        let counted = self
            .lost
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        if counted.is_err() {
            return false;
        }
        let is_there = self.add().is_ok();
        if !is_there {
            self.came_back();
        }
        is_there
    }

    /// Notes that a thread which was replaced ends.
    pub(super) fn came_back(&self) {
        self.lost.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn threads_are_replaced_a_bounded_number_of_times() {
        let (started, starts) = channel();
        let (crews, crew) = channel();
        let body: Body = Box::new(move |crew| {
            started.send(()).unwrap();
            drop(crews.send(Arc::clone(crew)));
        });
        let on_start: Arc<dyn Fn() + Send + Sync> = Arc::new(|| ());
        Crew::start("test", 1, &on_start, body).unwrap();
        let crew = crew.recv().unwrap();
        for _ in 0..LOST_MAX {
            assert!(crew.replace());
        }
        assert!(!crew.replace());
        crew.came_back();
        assert!(crew.replace());
        (0..LOST_MAX + 2).for_each(|_| starts.recv().unwrap());
    }
}
