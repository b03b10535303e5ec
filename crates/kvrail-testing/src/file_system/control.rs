//! The script in a file that may change at any time, read again when it does.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::rules::{Fault, Rules};

/// How often an operation that hangs looks whether it still has to.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A control file and the rules it held last.
#[derive(Debug)]
pub(super) struct Control {
    path: PathBuf,
    /// Where the number of operations that were hit is written.
    hits: File,
    state: Mutex<(Stamp, Rules)>,
}

/// What tells one content of the file from the next; it is replaced by renames.
type Stamp = Option<(u64, i64, i64, u64)>;

impl Control {
    pub(super) fn new(path: &Path, seed: u64) -> std::io::Result<Self> {
        let mut hits = path.as_os_str().to_owned();
        hits.push(".hits");
        Ok(Self {
            path: path.to_path_buf(),
            hits: File::create(hits)?,
            state: Mutex::new((None, Rules::new(seed))),
        })
    }

    /// Returns what happens to an operation.
    pub(super) fn decide(&self, operation: &str, path: &str) -> Fault {
        self.with_rules(|rules| {
            let before = rules.hits();
            let fault = rules.decide(operation, path);
            if rules.hits() > before {
                let text = format!("{:020}", rules.hits());
                drop(self.hits.write_all_at(text.as_bytes(), 0));
            }
            fault
        })
    }

    /// Lets the time of a fault pass.
    pub(super) fn hold(&self, operation: &str, path: &str, fault: &Fault) {
        let end = Instant::now() + fault.delay;
        thread::sleep(end.saturating_duration_since(Instant::now()));
        while fault.hang && self.with_rules(|rules| rules.still_hangs(operation, path)) {
            thread::sleep(LOOK_AGAIN);
        }
    }

    fn with_rules<T>(&self, work: impl FnOnce(&mut Rules) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = std::fs::metadata(&self.path).ok().map(|metadata| {
            let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
            (metadata.ino(), seconds, nanoseconds, metadata.len())
        });
        if stamp != state.0 {
            let script = std::fs::read_to_string(&self.path).unwrap_or_default();
            match state.1.set(&script) {
                Ok(()) => state.0 = stamp,
                Err(error) => eprintln!("{}: {error}", self.path.display()),
            }
        }
        work(&mut state.1)
    }
}
