//! Work that may never end, with an end to waiting for it.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// What came of the wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// The work goes on, on a thread that nobody waits for any more; the end of the process ends it.
    TimedOut(Duration),
    /// There was no thread for it, or it panicked.
    Failed,
}

impl fmt::Display for Unfinished {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut(limit) => {
                write!(out, "does not answer within {} s", limit.as_secs_f64())
            }
            Self::Failed => out.write_str("could not be tried"),
        }
    }
}

/// Runs `work` on a thread of its own and waits for at most `limit`.
pub(super) fn run<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let (sender, receiver) = channel();
    let spawned = thread::Builder::new()
        .name("kvrail-doctor".to_owned())
        .spawn(move || sender.send(work()));
    if spawned.is_err() {
        return Err(Unfinished::Failed);
    }
    receiver.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => Unfinished::TimedOut(limit),
        RecvTimeoutError::Disconnected => Unfinished::Failed,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn work_that_hangs_is_left_behind() {
        let limit = Duration::from_millis(20);
        let start = Instant::now();
        let outcome = run(limit, || thread::sleep(Duration::from_secs(3600)));
        assert_eq!(outcome, Err(Unfinished::TimedOut(limit)));
        assert!(start.elapsed() < Duration::from_secs(60));
        assert_eq!(run(Duration::from_secs(60), || 7), Ok(7));
    }

    #[test]
    fn work_that_panics_is_a_value() {
        let outcome = run(Duration::from_secs(60), || panic!("on purpose"));
        assert_eq!(outcome, Err::<(), _>(Unfinished::Failed));
    }

    #[test]
    fn the_limit_is_named() {
        let text = Unfinished::TimedOut(Duration::from_secs(10)).to_string();
        assert_eq!(text, "does not answer within 10 s");
    }
}
