//! How many bytes a second a path takes and gives, found out by writing and reading.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::trial::{Times, Trial, fill};
use super::{Folder, IoEngine};
use crate::chunk::PAGE_BYTES;
use crate::error::{ErrorKind, Result};
use crate::memory::StagingPool;

/// The time for all of it.
const BUDGET: Duration = Duration::from_millis(200);
/// The wait for a transfer of a path that is slow: a megabyte in two seconds is none to store on.
const LIMIT: Duration = Duration::from_secs(2);
/// The first file, which shows how large the others can be.
const PILOT_BYTES: usize = 1 << 20;
/// The largest file: a chunk of a large model.
const FILE_BYTES_MAX: usize = 16 << 20;
/// Files that the time shall do for, and those that are tried if it does not.
const FILES: u32 = 6;
const FILES_MIN: u32 = 3;

/// What a path does, in megabytes (10^6 bytes) a second; 1 at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bandwidth {
    /// Of as many bytes written as read, one after the other.
    pub mb_per_s: u64,
    /// Of writing alone.
    pub write_mb_per_s: u64,
    /// Of reading alone.
    pub read_mb_per_s: u64,
}

impl Bandwidth {
    /// What follows from writing and reading `bytes` bytes in these times.
    fn of(bytes: usize, times: Times) -> Self {
        let rate = |bytes: usize, time: Duration| {
            let rate = bytes as f64 / time.as_secs_f64().max(1e-9) / 1e6;
            // Casting a float keeps within the bounds of the target.
            (rate.round() as u64).max(1)
        };
        Self {
            mb_per_s: rate(2 * bytes, times.sum()),
            write_mb_per_s: rate(bytes, times.write),
            read_mb_per_s: rate(bytes, times.read),
        }
    }
}

/// Measures in a folder for a fifth of a second, with O_DIRECT or without: a file of up to 16 MiB is
/// written, read and compared, again and again, and the quickest one counts: what others do at the
/// time makes it slower only, and shall not be taken for what the path can do. For the same reason a
/// path that seems slow gets up to two seconds.
///
/// `file_name` must be unique to the caller; the file is removed again.
///
/// # Errors
/// [`ErrorKind::TimedOut`] when the first megabyte takes longer than two seconds,
/// [`ErrorKind::Closed`] soon after `goes_on` says no, and what writing
/// and reading says.
pub fn measure_bandwidth(
    engine: &dyn IoEngine,
    folder: &Folder,
    file_name: &str,
    direct: bool,
    goes_on: &dyn Fn() -> bool,
) -> Result<Bandwidth> {
    let begin = Instant::now();
    let trial = Trial {
        folder,
        file_name,
        direct,
        deadline: begin + LIMIT,
        goes_on,
    };
    let pool = StagingPool::new(FILE_BYTES_MAX, FILE_BYTES_MAX)?;
    let mut buffer = pool.take(begin)?;
    fill(buffer.as_mut_slice());
    let (pilot, mut buffer) = trial.round_trip(engine, buffer, PILOT_BYTES)?;
    let mut best = Bandwidth::of(PILOT_BYTES, pilot);
    let mut files = 0;
    while files < FILES_MIN || begin.elapsed() < BUDGET {
        // As much as the best so far moves in its part of the time.
        let bytes = best.mb_per_s as f64 * 1e6 / 2.0 * (BUDGET / FILES).as_secs_f64();
        let bytes = bytes as usize / PAGE_BYTES * PAGE_BYTES;
        let bytes = bytes.clamp(PILOT_BYTES, FILE_BYTES_MAX);
        match trial.round_trip(engine, buffer, bytes) {
            Ok((times, back)) => {
                buffer = back;
                let found = Bandwidth::of(bytes, times);
                if found.mb_per_s > best.mb_per_s {
                    best = found;
                }
            }
            // It is known how slow it is.
            Err(error) if error.kind() == ErrorKind::TimedOut => break,
            Err(error) => return Err(error),
        }
        files += 1;
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{FolderRules, PosixEngine};
    use super::*;

    #[test]
    fn rates_follow_from_bytes_and_times_and_are_never_zero() {
        let times = |write, read| Times {
            write: Duration::from_micros(write),
            read: Duration::from_micros(read),
        };
        let found = Bandwidth::of(10_000_000, times(20_000, 5_000));
        let expected = Bandwidth {
            mb_per_s: 800,
            write_mb_per_s: 500,
            read_mb_per_s: 2000,
        };
        assert_eq!(found, expected);
        let slow = Bandwidth::of(4096, times(2_000_000, 2_000_000));
        assert_eq!(
            [slow.mb_per_s, slow.write_mb_per_s, slow.read_mb_per_s],
            [1; 3]
        );
        assert!(Bandwidth::of(1 << 20, times(0, 0)).mb_per_s > 1000);
    }

    #[test]
    fn a_folder_is_measured_in_bounded_time_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(directory.path(), FolderRules::default()).unwrap();
        let engine = PosixEngine::new(2, Arc::new(|| ())).unwrap();
        let measure =
            |goes_on: &dyn Fn() -> bool| measure_bandwidth(&engine, &folder, ".b", false, goes_on);
        let begin = Instant::now();
        let found = measure(&|| true).unwrap();
        println!("{found:?} in {:?}", begin.elapsed());
        assert!(found.mb_per_s >= found.write_mb_per_s.min(found.read_mb_per_s));
        assert!(found.mb_per_s <= found.write_mb_per_s.max(found.read_mb_per_s) + 1);
        assert!(begin.elapsed() < LIMIT + BUDGET);
        assert_eq!(measure(&|| false).unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
