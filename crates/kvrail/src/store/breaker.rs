//! The circuit breaker of one path: whether it is used, and when it is tried again.
//!
//! A path is taken out at once when it does not answer, and after several errors or slow answers
//! in a row. While it is out nothing is asked of it but the probe, one at a time, and ever more
//! rarely. A probe that goes well brings the path back.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Errors in a row that take a path out; one alone may be about a single file.
const ERRORS_MAX: u32 = 4;
/// Slow answers in a row that take a path out; one alone may be a busy moment.
const SLOW_MAX: u32 = 4;
/// Time from taking a path out to the first probe.
const PROBE_PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest time between two probes: a path that is well again is out for so long at most.
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(15);
/// A path that fails again within this time goes on with the pauses it had.
const RELAPSE: Duration = Duration::from_secs(60);

/// What an operation showed about its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sign {
    /// It answered, and within the time that is allowed.
    Well,
    /// It answered, too slowly.
    Slow(String),
    /// It failed in a way that tells of the path, not of one file.
    Failed(String),
    /// It did not answer.
    Hung(String),
}

/// The breaker of one path.
#[derive(Debug)]
pub(super) struct Breaker {
    /// Mirrors whether the path is out, for those who only ask that.
    is_out: AtomicBool,
    /// Whether a sign that all is well changes anything; most do not, and cost no lock then.
    is_troubled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    out: Option<Out>,
    errors: u32,
    slow: u32,
    /// The pause before the next probe, once the path is out.
    pause: Duration,
    back_since: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Out {
    reason: String,
    probe_at: Instant,
    is_probing: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            is_out: AtomicBool::new(false),
            is_troubled: AtomicBool::new(false),
            state: Mutex::new(State {
                out: None,
                errors: 0,
                slow: 0,
                pause: PROBE_PAUSE_MIN,
                back_since: None,
            }),
        }
    }
}

impl Breaker {
    /// Returns whether the path is out.
    pub(super) fn is_out(&self) -> bool {
        self.is_out.load(Ordering::Acquire)
    }

    /// Returns why the path is out, `None` while it is in use.
    pub(super) fn reason(&self) -> Option<String> {
        self.lock().out.as_ref().map(|out| out.reason.clone())
    }

    /// Takes note of what an operation showed. Returns the reason when that takes the path out.
    pub(super) fn note(&self, sign: Sign, now: Instant) -> Option<String> {
        if sign == Sign::Well && !self.is_troubled.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.lock();
        self.is_troubled
            .store(sign != Sign::Well, Ordering::Release);
        if state.out.is_some() {
            // Operations that began before; the probe decides.
            return None;
        }
        let reason = match sign {
            Sign::Well => {
                (state.errors, state.slow) = (0, 0);
                return None;
            }
            Sign::Slow(reason) => {
                state.slow += 1;
                (state.slow >= SLOW_MAX).then_some(reason)
            }
            Sign::Failed(reason) => {
                state.errors += 1;
                (state.errors >= ERRORS_MAX).then_some(reason)
            }
            Sign::Hung(reason) => Some(reason),
        }?;
        let relapse = state
            .back_since
            .is_some_and(|since| now.duration_since(since) < RELAPSE);
        if !relapse {
            state.pause = PROBE_PAUSE_MIN;
        }
        state.out = Some(Out {
            reason: reason.clone(),
            probe_at: now + state.pause,
            is_probing: false,
        });
        self.is_out.store(true, Ordering::Release);
        Some(reason)
    }

    /// Returns whether a probe shall begin now; if so, the caller runs it and reports its end.
    pub(super) fn begin_probe(&self, now: Instant) -> bool {
        let mut state = self.lock();
        match &mut state.out {
            Some(out) if !out.is_probing && now >= out.probe_at => {
                out.is_probing = true;
                true
            }
            _ => false,
        }
    }

    /// Takes note of a probe's end. Returns whether the path is back.
    pub(super) fn end_probe(&self, was_well: bool, now: Instant) -> bool {
        let mut state = self.lock();
        // Doubled either way: a path that is back and fails again soon waits longer.
        state.pause = (state.pause * 2).min(PROBE_PAUSE_MAX);
        if was_well {
            state.out = None;
            (state.errors, state.slow) = (0, 0);
            state.back_since = Some(now);
            self.is_out.store(false, Ordering::Release);
            return true;
        }
        let pause = state.pause;
        if let Some(out) = &mut state.out {
            out.is_probing = false;
            out.probe_at = now + pause;
        }
        false
    }

    /// Takes note of a probe that went well and took too long: another one tells more.
    pub(super) fn probe_again(&self, now: Instant) {
        if let Some(out) = &mut self.lock().out {
            out.is_probing = false;
            out.probe_at = now + PROBE_PAUSE_MIN;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Sign {
        Sign::Failed("EIO".into())
    }

    #[test]
    fn a_hang_takes_the_path_out_at_once_errors_and_slowness_only_in_a_row() {
        let now = Instant::now();
        let breaker = Breaker::default();
        for sign in [failed(), Sign::Slow("3 s".into())] {
            for _ in 0..20 {
                assert_eq!(breaker.note(sign.clone(), now), None);
                assert_eq!(breaker.note(sign.clone(), now), None);
                assert_eq!(breaker.note(Sign::Well, now), None);
            }
        }
        let told: Vec<_> = (0..8).filter_map(|_| breaker.note(failed(), now)).collect();
        assert_eq!(told, ["EIO"], "told once");
        assert!(breaker.is_out() && breaker.reason().unwrap() == "EIO");
        let other = Breaker::default();
        assert!(other.note(Sign::Hung("hangs".into()), now).is_some());
        assert!(other.is_out());
    }

    #[test]
    fn probes_come_one_at_a_time_ever_more_rarely_and_bring_it_back() {
        let mut now = Instant::now();
        let breaker = Breaker::default();
        breaker.note(Sign::Hung("hangs".into()), now);
        assert!(!breaker.begin_probe(now));
        let mut pauses = Vec::new();
        for _ in 0..10 {
            let mut pause = Duration::ZERO;
            while !breaker.begin_probe(now + pause) {
                pause += Duration::from_millis(250);
            }
            pauses.push(pause);
            now += pause;
            assert!(!breaker.begin_probe(now + PROBE_PAUSE_MAX), "one at a time");
            assert!(!breaker.end_probe(false, now));
        }
        assert_eq!(pauses[..3], [1, 2, 4].map(|n| PROBE_PAUSE_MIN * n));
        assert_eq!(pauses[9], PROBE_PAUSE_MAX);
        now += PROBE_PAUSE_MAX;
        assert!(breaker.begin_probe(now) && breaker.end_probe(true, now));
        assert!(!breaker.is_out());
        // A relapse goes on with long pauses, a new failure much later starts anew.
        breaker.note(Sign::Hung("again".into()), now);
        assert!(!breaker.begin_probe(now + PROBE_PAUSE_MAX / 2));
        now += PROBE_PAUSE_MAX;
        assert!(breaker.begin_probe(now) && breaker.end_probe(true, now));
        now += 2 * RELAPSE;
        breaker.note(Sign::Hung("later".into()), now);
        assert!(breaker.begin_probe(now + PROBE_PAUSE_MIN));
    }
}
