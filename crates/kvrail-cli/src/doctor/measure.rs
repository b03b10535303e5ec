//! A quick write and read of one file through each of the library's engines, all bytes compared.
//!
//! Not a benchmark: one file, once, no warm-up. It shows whether a directory is far from what its
//! device can do; `kvrail bench` measures.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail::io::{
    IoEngine, IoFile, IoHandle, IoRequest, OpenMode, Operation, PosixEngine, UringEngine,
};
use kvrail::memory::{StagingPool, StagingRange};
use kvrail_cuda::probe::Timing;
use serde::Serialize;

use super::scratch_file::ScratchFile;

/// The file's length at most.
pub(super) const FILE_BYTES: u64 = 64 << 20;
/// What one request moves: as large as the parts that kvrail loads a chunk in.
const PART_BYTES: usize = 4 << 20;
/// Threads, and requests in flight: kvrail's default `disk_io_threads`.
pub(super) const THREADS: usize = 4;
/// After this no more requests are started, in each direction.
const SECONDS_MAX: Duration = Duration::from_secs(2);

/// An engine that goes through host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Posix,
    Uring,
}

impl Engine {
    /// Starts it as a store does by default.
    pub(super) fn start(self) -> kvrail::Result<Box<dyn IoEngine>> {
        let on_start = Arc::new(|| ());
        Ok(match self {
            Self::Posix => Box::new(PosixEngine::new(THREADS, on_start)?),
            Self::Uring => Box::new(UringEngine::new(THREADS, on_start)?),
        })
    }
}

/// What was measured on one engine.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measurement {
    pub(super) engine: &'static str,
    /// Whether O_DIRECT was used.
    pub(super) direct: bool,
    /// The bytes that were written, and then read.
    pub(super) bytes: u64,
    /// From the first request to the end of an fsync, in 10^9 bytes.
    pub(super) write_gb_per_second: f64,
    /// After the page cache was asked to drop the file.
    pub(super) read_gb_per_second: f64,
}

impl Measurement {
    /// What cuFile took for one file.
    pub(super) fn of_cufile(bytes: u64, timing: Timing) -> Self {
        Self {
            engine: "cufile",
            direct: true,
            bytes,
            write_gb_per_second: gb_per_second(bytes, timing.write),
            read_gb_per_second: gb_per_second(bytes, timing.read),
        }
    }
}

/// Writes a file, reads it and compares; the error is one line.
///
/// Waits for single requests until `limit` after it began, but opening and fsync take as long as
/// they take: to be called where that can be left behind.
pub(super) fn measure(
    directory: &Path,
    file_system: &str,
    engine: Engine,
    direct: bool,
    limit: Duration,
) -> Result<Measurement, String> {
    let run = Run::new(directory, file_system, engine, direct, limit).map_err(|e| e.to_string())?;
    run.measure()
        .map_err(|error| error.to_string().replace('\n', " "))
}

struct Run {
    engine: Box<dyn IoEngine>,
    pool: StagingPool,
    file: Arc<IoFile>,
    pattern: Vec<u8>,
    deadline: Instant,
    // Dropped last: the file is closed before its name goes.
    _scratch: ScratchFile,
}

impl Run {
    fn new(
        directory: &Path,
        file_system: &str,
        engine: Engine,
        direct: bool,
        limit: Duration,
    ) -> kvrail::Result<Self> {
        let engine = engine.start()?;
        let pool = StagingPool::new(THREADS * PART_BYTES, PART_BYTES)?;
        // Where it cannot make something of the memory it works as well.
        drop(engine.prepare(&pool));
        let scratch = ScratchFile::new(directory);
        let file = IoFile::open(scratch.path(), OpenMode::CreateNew, direct)?;
        scratch.hide(file_system);
        Ok(Self {
            engine,
            pool,
            file: Arc::new(file),
            pattern: pattern(),
            deadline: Instant::now() + limit,
            _scratch: scratch,
        })
    }

    fn measure(&self) -> kvrail::Result<Measurement> {
        let parts_max = FILE_BYTES / PART_BYTES as u64;
        let mut buffers = Vec::new();
        while let Some(mut buffer) = self.pool.try_take(0) {
            // Here and not in the loop: a page's first touch is not the file system's time.
            buffer.as_mut_slice().copy_from_slice(&self.pattern);
            buffers.push(buffer);
        }
        let start = Instant::now();
        let parts = self.transfer(Operation::Write, parts_max, &mut buffers)?;
        self.file.sync()?;
        let write = start.elapsed();
        // Best effort: where the pages stay, the reading is that of the page cache.
        let _ = rustix::fs::fadvise(&*self.file, 0, None, rustix::fs::Advice::DontNeed);
        let start = Instant::now();
        let read_parts = self.transfer(Operation::Read, parts, &mut buffers)?;
        let read = start.elapsed();
        let bytes = |parts: u64| parts * PART_BYTES as u64;
        Ok(Measurement {
            engine: self.engine.name(),
            direct: self.file.is_direct(),
            bytes: bytes(parts),
            write_gb_per_second: gb_per_second(bytes(parts), write),
            read_gb_per_second: gb_per_second(bytes(read_parts), read),
        })
    }

    /// Moves parts from the first on, at most `parts_max`, and returns how many.
    fn transfer(
        &self,
        operation: Operation,
        parts_max: u64,
        buffers: &mut Vec<StagingRange>,
    ) -> kvrail::Result<u64> {
        let start = Instant::now();
        let mut in_flight: VecDeque<(u64, IoHandle)> = VecDeque::new();
        let mut next = 0;
        loop {
            while next < parts_max && (start.elapsed() < SECONDS_MAX || next == 0) {
                let Some(mut buffer) = buffers.pop() else {
                    break;
                };
                stamp(buffer.as_mut_slice(), operation, next);
                let request = IoRequest {
                    operation,
                    file: Arc::clone(&self.file),
                    offset: next * PART_BYTES as u64,
                    buffer,
                };
                in_flight.push_back((next, self.engine.submit(request)));
                next += 1;
            }
            let Some((part, handle)) = in_flight.pop_front() else {
                return Ok(next);
            };
            let buffer = handle.wait(self.deadline)?;
            if operation == Operation::Read {
                self.compare(part, buffer.as_slice())?;
            }
            buffers.push(buffer);
        }
    }

    fn compare(&self, part: u64, found: &[u8]) -> kvrail::Result<()> {
        let is_right = match (
            found.split_first_chunk(),
            self.pattern.split_first_chunk::<8>(),
        ) {
            (Some((stamp, rest)), Some((_, pattern))) => {
                *stamp == part.to_le_bytes() && rest == pattern
            }
            _ => false,
        };
        if is_right {
            return Ok(());
        }
        let message = format!("what was read of part {part} is not what was written");
        Err(kvrail::Error::new(kvrail::ErrorKind::Damaged, message))
    }
}

/// Writes the part's number in front, so that parts differ; poisons it for a read.
fn stamp(buffer: &mut [u8], operation: Operation, part: u64) {
    let stamp = match operation {
        Operation::Write => part.to_le_bytes(),
        Operation::Read => [0xFF; 8],
    };
    if let Some(first) = buffer.first_chunk_mut() {
        *first = stamp;
    }
}

/// Makes bytes that no file system can compress (splitmix64).
fn pattern() -> Vec<u8> {
    let mut state = 0_u64;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)).to_le_bytes()
    };
    (0..PART_BYTES / 8).flat_map(|_| next()).collect()
}

fn gb_per_second(bytes: u64, duration: Duration) -> f64 {
    bytes as f64 / 1e9 / duration.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_read_and_gone() {
        let directory = tempfile::tempdir().unwrap();
        for (file_system, engine) in [
            ("ext4", Engine::Posix),
            ("fuse", Engine::Posix),
            ("ext4", Engine::Uring),
        ] {
            if let (Engine::Uring, Err(error)) = (engine, engine.start()) {
                eprintln!("skipped: {error}");
                continue;
            }
            let limit = Duration::from_secs(60);
            let found = measure(directory.path(), file_system, engine, false, limit).unwrap();
            let name = engine.start().unwrap().name();
            assert_eq!((found.engine, found.direct), (name, false));
            assert!(found.bytes > 0 && found.bytes <= FILE_BYTES);
            assert!(found.write_gb_per_second > 0.0 && found.read_gb_per_second > 0.0);
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn bytes_that_differ_are_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let run = {
            let limit = Duration::from_secs(60);
            Run::new(directory.path(), "ext4", Engine::Posix, false, limit).unwrap()
        };
        let mut part = run.pattern.clone();
        stamp(&mut part, Operation::Write, 3);
        run.compare(3, &part).unwrap();
        assert!(run.compare(4, &part).is_err(), "another part");
        part[PART_BYTES - 1] ^= 1;
        let error = run.compare(3, &part).unwrap_err();
        assert_eq!(error.kind(), kvrail::ErrorKind::Damaged);
        assert!(run.compare(3, &[]).is_err());
    }

    #[test]
    fn a_directory_that_is_missing_is_one_line() {
        let error = {
            let path = Path::new("/nonexistent");
            measure(path, "ext4", Engine::Posix, false, Duration::ZERO).unwrap_err()
        };
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
