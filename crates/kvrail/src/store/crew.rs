//! Threads that do the same work, and that are replaced when the file system does not let them go.

use std::fmt;

use super::watch::Watched;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::thread;

/// Lost threads for each that was asked for; beyond that they are not replaced any more.
const LOST_MAX: usize = 4;

/// What a thread of a crew does until there is no work any more or it was replaced.
type Body = Box<dyn Fn(&Arc<Crew>) + Send + Sync>;

/// Some threads, and those that are lost.
pub(super) struct Crew {
    name: &'static str,
    on_start: Arc<dyn Fn() + Send + Sync>,
    body: Body,
    /// Threads that were asked for.
    threads: AtomicUsize,
    /// Threads that were given up and replaced.
    lost: AtomicUsize,
    /// Threads that take work; `threads` but for those that were given up and not replaced.
    serving: AtomicUsize,
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
    ) -> Result<Arc<Self>> {
        let crew = Arc::new(Self {
            name,
            on_start: Arc::clone(on_start),
            body,
            threads: AtomicUsize::new(threads),
            lost: AtomicUsize::new(0),
            serving: AtomicUsize::new(threads),
            started: AtomicUsize::new(0),
        });
        for _ in 0..threads {
            crew.add().map_err(|source| {
                Error::new(ErrorKind::Io, format!("start a {name} thread")).with_source(source)
            })?;
        }
        Ok(crew)
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

    /// Makes the crew as large as `threads`, unless it is. What the system refuses is done without.
    pub(super) fn grow(self: &Arc<Self>, threads: usize) {
        let more = |has| (has < threads).then_some(has + 1);
        let counted = || {
            self.threads
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
        };
        while counted().is_ok() {
            self.serving.fetch_add(1, Ordering::AcqRel);
            if self.add().is_err() {
                self.serving.fetch_sub(1, Ordering::AcqRel);
                self.threads.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
    }

    /// Starts a thread for one that is given up; `false` when there are too many of them, and the
    /// crew has a thread less.
    pub(super) fn replace(self: &Arc<Self>) -> bool {
        let lost_max = self.threads.load(Ordering::Acquire) * LOST_MAX;
        let more = |lost| (lost < lost_max).then_some(lost + 1);
        let counted = self
            .lost
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        if counted.is_ok() {
            if self.add().is_ok() {
                return true;
            }
            self.lost.fetch_sub(1, Ordering::AcqRel);
        }
        self.serving.fetch_sub(1, Ordering::AcqRel);
        false
    }

    /// Returns whether every thread was given up and none could be started in its place. Work that
    /// waits then has nobody to do it until a thread comes back.
    pub(super) fn is_gone(&self) -> bool {
        self.serving.load(Ordering::Acquire) == 0
    }

    /// Returns whether the thread that is through with a job takes another one. When it was given
    /// up meanwhile, it does only if the crew has too few threads.
    pub(super) fn goes_on(&self, watched: &Watched) -> bool {
        let Some(is_replaced) = watched.given_up() else {
            return true;
        };
        if is_replaced {
            self.lost.fetch_sub(1, Ordering::AcqRel);
        }
        let threads = self.threads.load(Ordering::Acquire);
        let more = |serving| (serving < threads).then_some(serving + 1);
        self.serving
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .is_ok()
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
        assert!(!crew.is_gone());
        assert!(!crew.replace());
        assert!(crew.is_gone(), "the last one was not replaced");
        // One comes back and takes the place that is empty; the next finds it taken.
        assert!(crew.goes_on(&Watched::replaced()));
        assert!(!crew.is_gone());
        assert!(!crew.goes_on(&Watched::replaced()));
        assert!(crew.goes_on(&Watched::default()), "it was not given up");
        assert!(crew.replace());
        (0..LOST_MAX + 2).for_each(|_| starts.recv().unwrap());
        crew.grow(3);
        crew.grow(2);
        (0..2).for_each(|_| starts.recv().unwrap());
        assert!(starts.try_recv().is_err(), "as many as were asked for");
    }
}
