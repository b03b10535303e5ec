//! How a path fares: what its operations show reaches the breaker, and what that says the people.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::breaker::{Breaker, Sign};
use super::metrics::Metrics;
use super::notice::{Notices, Topic};
use crate::error::{Error, ErrorKind, Result};

/// Bytes a second below which a transfer is slow, beside the time that any operation may take:
/// computing KV is quicker than reading it at such a rate.
const SLOW_BYTES_PER_SECOND: f64 = 4e6;

/// The state of one path.
#[derive(Debug)]
pub(super) struct Health {
    breaker: Breaker,
    slow_limit: Duration,
    notices: Arc<Notices>,
    metrics: Arc<Metrics>,
}

impl Health {
    pub(super) fn new(slow_limit: Duration, notices: Arc<Notices>, metrics: Arc<Metrics>) -> Self {
        Self {
            breaker: Breaker::default(),
            slow_limit,
            notices,
            metrics,
        }
    }

    /// Returns whether the path is left alone.
    pub(super) fn is_out(&self) -> bool {
        self.breaker.is_out()
    }

    /// Returns why the path is left alone, `None` while it is in use.
    pub(super) fn reason(&self) -> Option<String> {
        self.breaker.reason()
    }

    /// Fails while the path is left alone.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] with the reason.
    pub(super) fn check(&self, root: &Path) -> Result<()> {
        if !self.is_out() {
            return Ok(());
        }
        let reason = self.reason().unwrap_or_default();
        let message = format!("left alone until it is well again ({reason})");
        Err(Error::new(ErrorKind::Unavailable, message).with_path(root))
    }

    /// Takes note of a load or a lookup that began at `began` and moved `bytes`, and how it ended.
    pub(super) fn note(&self, root: &Path, began: Instant, bytes: usize, error: Option<&Error>) {
        let now = Instant::now();
        let took = now.duration_since(began).as_secs_f64();
        let allowed = self.slow_limit.as_secs_f64() + bytes as f64 / SLOW_BYTES_PER_SECOND;
        let sign = match error {
            Some(error) if error.kind() == ErrorKind::Unavailable => return,
            Some(error) if is_timeout(error) => Sign::Hung(error.to_string()),
            Some(error) if tells_of_the_path(error) => Sign::Failed(error.to_string()),
            _ if took > allowed => Sign::Slow(format!(
                "an operation took {took:.1} s, more than {allowed:.1} s is slow"
            )),
            _ => Sign::Well,
        };
        self.note_sign(root, sign, now);
    }

    /// Takes note of a store. Its errors are about writing, and stores pause for those; loads go on
    /// unless the path hangs or is slow.
    pub(super) fn note_store(
        &self,
        root: &Path,
        began: Instant,
        bytes: usize,
        error: Option<&Error>,
    ) {
        match error {
            Some(error) if !is_timeout(error) => {}
            error => self.note(root, began, bytes, error),
        }
    }

    /// Takes note that something on this path did not come to its end in time.
    pub(super) fn note_hung(&self, root: &Path, message: String) {
        self.note_sign(root, Sign::Hung(message), Instant::now());
    }

    fn note_sign(&self, root: &Path, sign: Sign, now: Instant) {
        let Some(reason) = self.breaker.note(sign, now) else {
            return;
        };
        self.metrics.paths_taken_out.add(1);
        self.notices.warn(Topic::PathOut, || {
            format!(
                "path is left alone until it is well again, nothing is loaded from it or stored \
                 on it ({reason}): `{}`",
                root.display()
            )
        });
    }

    /// Returns whether a probe shall begin now; if so, its end must be reported.
    pub(super) fn begin_probe(&self) -> bool {
        self.is_out() && self.breaker.begin_probe(Instant::now())
    }

    /// Takes note of a probe's end: the path is back when it went well and was not slow.
    pub(super) fn end_probe(&self, root: &Path, was_well: bool, took: Duration) {
        let is_slow = took > self.slow_limit;
        let now = Instant::now();
        if was_well && is_slow {
            // It hung and came back, or is slow: the next probe tells.
            self.breaker.probe_again(now);
        } else if self.breaker.end_probe(was_well, now) {
            self.metrics.paths_taken_back.add(1);
            self.notices.info(Topic::PathBack, || {
                format!("path is well again and in use: `{}`", root.display())
            });
        }
    }
}

/// Returns whether an error says that the file system did not answer, rather than anything else.
pub(super) fn is_timeout(error: &Error) -> bool {
    error.kind() == ErrorKind::TimedOut && error.os_error().is_some()
}

/// Returns whether an error tells of the path as a whole rather than of one file or of rights.
pub(super) fn tells_of_the_path(error: &Error) -> bool {
    use std::io::ErrorKind as Os;
    error.kind() == ErrorKind::Io
        && error.os_error().is_some_and(|source| {
            let is_loop = source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
            !is_loop
                && !matches!(
                    source.kind(),
                    Os::NotFound
                        | Os::PermissionDenied
                        | Os::ReadOnlyFilesystem
                        | Os::AlreadyExists
                        | Os::NotADirectory
                        | Os::IsADirectory
                        | Os::InvalidInput
                        | Os::Interrupted
                )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(slow_limit: Duration) -> (Health, Arc<Notices>) {
        let notices = Arc::new(Notices::default());
        let health = Health::new(slow_limit, Arc::clone(&notices), Arc::default());
        (health, notices)
    }

    fn io(number: i32) -> Error {
        let source = std::io::Error::from_raw_os_error(number);
        Error::io("open", Path::new("/kv/chunk"), source)
    }

    #[test]
    fn only_what_tells_of_the_path_takes_it_out_and_it_is_said_once() {
        let root = Path::new("/kv");
        let (health, notices) = health(Duration::from_secs(60));
        let note = |error: Error| {
            (0..10).for_each(|_| health.note(root, Instant::now(), 0, Some(&error)));
        };
        // ENOENT, EACCES, EROFS, ENOSPC, ELOOP; a damaged chunk; a wait for something else.
        [2, 13, 30, 28, 40].map(io).into_iter().for_each(note);
        note(Error::new(ErrorKind::Damaged, "page 3"));
        note(Error::new(ErrorKind::TimedOut, "no staging buffer"));
        assert!(!health.is_out() && health.check(root).is_ok());
        note(io(116));
        assert!(health.is_out());
        let error = health.check(root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let said = notices.take();
        assert_eq!(said.len(), 1);
        assert!(said[0].message.contains("/kv"), "{}", said[0].message);
    }

    #[test]
    fn slowness_is_measured_against_time_and_bytes() {
        let root = Path::new("/kv");
        let (health, _) = health(Duration::from_secs(2));
        let ago = |seconds| {
            Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .unwrap()
        };
        (0..10).for_each(|_| health.note(root, ago(9), 32 << 20, None));
        assert!(!health.is_out(), "32 MiB may take 10 s");
        (0..10).for_each(|_| health.note(root, ago(9), 1 << 20, None));
        assert!(health.is_out());
    }

    #[test]
    fn errors_of_stores_leave_the_path_to_loads() {
        let root = Path::new("/kv");
        let (health, _) = health(Duration::from_secs(2));
        (0..10).for_each(|_| health.note_store(root, Instant::now(), 0, Some(&io(5))));
        assert!(!health.is_out());
        let hung = io(5).with_source(std::io::Error::from(std::io::ErrorKind::TimedOut));
        assert!(tells_of_the_path(&hung));
        let hung = Error::new(ErrorKind::TimedOut, "hung")
            .with_source(std::io::Error::from(std::io::ErrorKind::TimedOut));
        health.note_store(root, Instant::now(), 0, Some(&hung));
        assert!(health.is_out());
    }
}
