//! Whether a janitor gets on with its work, and whether it may.
//!
//! A janitor's file operations are done on its own thread, and one that hangs in the kernel cannot
//! be taken back. So the janitor says before each step that it begins. The store's watch looks
//! whether the step is done in time and takes the path out of use when it is not; and it halts a
//! janitor whose path is left alone, for whatever reason.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a janitor and the watch of its store tell each other.
#[derive(Debug, Default)]
pub(super) struct Progress {
    step: Mutex<Option<Begun>>,
    is_halted: AtomicBool,
}

#[derive(Debug)]
struct Begun {
    at: Instant,
    /// Whether it was said that it takes too long.
    is_told: bool,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Option<Begun>> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step begins now: a file operation or a few.
    pub(super) fn step(&self) {
        *self.lock() = Some(Begun {
            at: Instant::now(),
            is_told: false,
        });
    }

    /// There is nothing to do for a while.
    pub(super) fn rest(&self) {
        *self.lock() = None;
    }

    /// Returns how long a step has taken that is not done after `limit`; once for each step, as the
    /// path may be well again long before the step ends.
    pub(super) fn overdue(&self, limit: Duration) -> Option<Duration> {
        let mut step = self.lock();
        let begun = step.as_mut().filter(|begun| !begun.is_told)?;
        let took = begun.at.elapsed();
        begun.is_told = took > limit;
        begun.is_told.then_some(took)
    }

    /// Says whether the path is to be left alone.
    pub(super) fn set_halted(&self, is_halted: bool) {
        self.is_halted.store(is_halted, Ordering::Relaxed);
    }

    /// Returns whether the path is to be left alone.
    pub(super) fn is_halted(&self) -> bool {
        self.is_halted.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_step_that_takes_too_long_is_overdue_and_it_is_said_once() {
        let progress = Progress::default();
        assert_eq!(progress.overdue(Duration::ZERO), None);
        progress.step();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(progress.overdue(Duration::from_secs(3600)), None);
        assert!(progress.overdue(Duration::from_millis(1)).is_some());
        assert_eq!(progress.overdue(Duration::from_millis(1)), None);
        progress.step();
        std::thread::sleep(Duration::from_millis(2));
        assert!(progress.overdue(Duration::from_millis(1)).is_some());
        progress.rest();
        assert_eq!(progress.overdue(Duration::ZERO), None);
    }
}
