//! A wait with an end for work that may have none.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::mpsc::{RecvTimeoutError, channel};
use crate::sync::thread;

/// Runs `work` on a thread of its own and waits for it until `limit`.
///
/// Work that is not done by then goes on, with everything that it owns; nobody takes its result.
/// For calls at start only: each that hangs costs a thread.
///
/// # Errors
/// [`ErrorKind::TimedOut`] at the limit; [`ErrorKind::Closed`] when the work panicked or there was
/// no thread for it.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = channel();
    let thread = thread::Builder::new().name("kvrail-bounded".to_owned());
    let started = thread.spawn(move || sender.send(work()));
    let received = match started {
        Ok(_) => receiver.recv_timeout(limit),
        Err(source) => return Err(Error::new(ErrorKind::Closed, what).with_source(source)),
    };
    received.map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            let seconds = limit.as_secs_f64();
            let message = format!("{what} did not return within {seconds:.1} s");
            Error::new(ErrorKind::TimedOut, message)
        }
        RecvTimeoutError::Disconnected => {
            Error::new(ErrorKind::Closed, format!("{what} could not be tried"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_hangs_is_left_behind_and_what_panics_is_a_value() {
        let start = Instant::now();
        let hangs = || thread::sleep(Duration::from_secs(3600));
        let error = within(Duration::from_millis(20), "a call", hangs).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(
            error.to_string().starts_with("a call did not return"),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(60));
        let long = Duration::from_secs(60);
        assert_eq!(within(long, "a call", || 7).unwrap(), 7);
        let panics = || panic!("on purpose");
        let error = within::<()>(long, "a call", panics).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
}
