//! Reading no faster than asked, so that a scrub does not slow those down who use the store.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Hands out moments at which so many bytes may be read.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: Option<u64>,
    next: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may be read.
    pub(super) fn wait(&self, bytes: u64) {
        std::thread::sleep(self.reserve(bytes, Instant::now()));
    }

    /// Reserves time for `bytes`; returns how long to wait before.
    fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.bytes_per_second else {
            return Duration::ZERO;
        };
        #[expect(clippy::cast_precision_loss, reason = "a pace need not be exact")]
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // Time that nobody used is not saved up.
        let start = (*next).max(now);
        *next = start + takes;
        start.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spread_over_time_and_pauses_are_not_made_up_for() {
        let pace = Pace::new(Some(1000));
        let start = Instant::now() + Duration::from_secs(1);
        assert_eq!(pace.reserve(500, start), Duration::ZERO);
        assert_eq!(pace.reserve(500, start), Duration::from_millis(500));
        assert_eq!(pace.reserve(1, start), Duration::from_secs(1));
        let later = start + Duration::from_secs(100);
        assert_eq!(pace.reserve(2000, later), Duration::ZERO);
        assert_eq!(pace.reserve(1, later), Duration::from_secs(2));
        assert_eq!(Pace::new(None).reserve(u64::MAX, start), Duration::ZERO);
    }
}
