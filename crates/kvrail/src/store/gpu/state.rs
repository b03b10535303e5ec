//! How cuFile fares on one path: whether it is used there, and why not (any more).

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;

/// Failures in a row after which a path is left to POSIX. One may be chance; each costs a request
/// the time of its retry.
const FAILURES_MAX: u32 = 3;

/// Whether cuFile moves the bytes of a path.
#[derive(Debug, Default)]
pub(in crate::store) struct CufileState {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    used: Option<bool>,
    failures_in_a_row: u32,
    reason: String,
}

impl CufileState {
    /// Returns whether cuFile is used.
    pub(in crate::store) fn is_on(&self) -> bool {
        self.lock().used == Some(true)
    }

    /// Returns whether it was decided, and how, with the reason in words.
    pub(in crate::store) fn describe(&self) -> Option<(bool, String)> {
        let inner = self.lock();
        inner.used.map(|used| (used, inner.reason.clone()))
    }

    /// Decides for cuFile.
    pub(super) fn turn_on(&self, reason: String) {
        let mut inner = self.lock();
        inner.used = Some(true);
        inner.failures_in_a_row = 0;
        inner.reason = reason;
    }

    /// Decides for POSIX.
    pub(super) fn turn_off(&self, reason: String) {
        let mut inner = self.lock();
        inner.used = Some(false);
        inner.reason = reason;
    }

    /// Notes that cuFile did what it should.
    pub(in crate::store) fn succeeded(&self) {
        self.lock().failures_in_a_row = 0;
    }

    /// Notes that cuFile failed where POSIX did not, or hung.
    ///
    /// Returns whether this was one too many: cuFile is not used on the path from now on. A call
    /// that hangs keeps its thread for ever, and a transfer that lies is worse than one that fails,
    /// so either is one too many.
    pub(in crate::store) fn failed(&self, error: &Error, at_once: bool) -> bool {
        let mut inner = self.lock();
        inner.failures_in_a_row += 1;
        if inner.used != Some(true) || (!at_once && inner.failures_in_a_row < FAILURES_MAX) {
            return false;
        }
        let count = inner.failures_in_a_row;
        inner.used = Some(false);
        inner.reason = format!("given up while running, after {count} failures in a row: {error}");
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn failures_in_a_row_or_one_hang_end_the_use() {
        let error = || Error::new(ErrorKind::Gpu, "cuFileRead: 5030");
        let state = CufileState::default();
        assert_eq!(state.describe(), None);
        assert!(!state.failed(&error(), true), "was not in use");
        state.turn_on("probe".into());
        for _ in 0..10 {
            assert!(!state.failed(&error(), false));
            assert!(!state.failed(&error(), false));
            state.succeeded();
        }
        assert!(!state.failed(&error(), false));
        assert!(!state.failed(&error(), false));
        assert!(state.is_on());
        assert!(state.failed(&error(), false));
        assert!(!state.is_on());
        assert!(!state.failed(&error(), false), "told once");
        let (_, reason) = state.describe().unwrap();
        assert!(
            reason.contains("3 failures") && reason.contains("5030"),
            "{reason}"
        );
        state.turn_on("probe".into());
        assert!(state.failed(&error(), true));
    }
}
