//! What an engine of rings does with its requests.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode};

use super::super::{IoFile, OpenMode, PosixEngine};
use super::*;
use crate::error::ErrorKind;
use crate::memory::StagingRange;

/// Far beyond what any step takes.
const LONG: Duration = Duration::from_secs(30);
/// Within which a request that hangs is given up.
const SHORT: Duration = Duration::from_millis(50);

fn later(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// An engine, or the reason why there is none, which is the test's to tell.
fn engine(threads: usize) -> Option<UringEngine> {
    UringEngine::new(threads, Arc::new(|| ()))
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()
}

fn requests(
    operation: Operation,
    file: &Arc<IoFile>,
    mut buffer: StagingRange,
    part_bytes: usize,
) -> Vec<IoRequest> {
    let mut offset = 0;
    let mut requests = Vec::new();
    while !buffer.is_empty() {
        let part = buffer.split_to(part_bytes);
        let bytes = part.len() as u64;
        requests.push(IoRequest {
            operation,
            file: Arc::clone(file),
            offset,
            buffer: part,
        });
        offset += bytes;
    }
    requests
}

/// Moves a buffer whole, in parts, and puts it together again.
fn transfer(
    engine: &dyn IoEngine,
    operation: Operation,
    path: &Path,
    direct: bool,
    buffer: StagingRange,
    part_bytes: usize,
) -> Result<StagingRange> {
    let mode = match operation {
        Operation::Read => OpenMode::Read,
        Operation::Write => OpenMode::CreateNew,
    };
    let file = Arc::new(IoFile::open(path, mode, direct)?);
    let handles = engine.submit_all(requests(operation, &file, buffer, part_bytes));
    let mut whole: Option<StagingRange> = None;
    for handle in handles {
        let part = handle.wait(later(LONG))?;
        match &mut whole {
            None => whole = Some(part),
            Some(whole) => whole.rejoin(part).unwrap(),
        }
    }
    Ok(whole.unwrap())
}

fn fill(bytes: &mut [u8], seed: usize) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = (index * 31 + seed + index / 4096) as u8;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_one_engine_writes_the_other_reads(
        pages in 1_usize..300, part_pages in 1_usize..40,
        uring_writes: bool, is_registered: bool, is_direct: bool,
    ) {
        let Some(uring) = engine(2) else { return Ok(()); };
        let posix = PosixEngine::new(2, Arc::new(|| ())).unwrap();
        let engines: [&dyn IoEngine; 2] = match uring_writes {
            true => [&uring, &posix],
            false => [&posix, &uring],
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        // Where /tmp is in memory, an old kernel does not open it direct.
        let probe = directory.path().join("probe");
        let is_direct = is_direct && IoFile::open(&probe, OpenMode::CreateNew, true).is_ok();
        let bytes = pages * 4096;
        let pool = StagingPool::new(2 * bytes, bytes).unwrap();
        if is_registered {
            prop_assert_eq!(uring.register(&pool), Ok(2));
        }
        let mut source = pool.take(later(LONG)).unwrap();
        fill(source.as_mut_slice(), pages);
        let part = part_pages * 4096;
        let source = transfer(engines[0], Operation::Write, &path, is_direct, source, part).unwrap();
        let target = pool.take(later(LONG)).unwrap();
        let target = transfer(engines[1], Operation::Read, &path, is_direct, target, part).unwrap();
        prop_assert!(source.as_slice() == target.as_slice());
        prop_assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes as u64);
        drop((source, target));
        prop_assert_eq!(pool.free_count(), 2);
        prop_assert_eq!(uring.counts().held, 0);
    }
}

#[test]
fn a_short_file_is_damaged_as_posix_says_it() {
    let Some(uring) = engine(1) else { return };
    let posix = PosixEngine::new(1, Arc::new(|| ())).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, [1; 5000]).unwrap();
    let pool = StagingPool::new(8192, 8192).unwrap();
    let read = |engine: &dyn IoEngine| {
        let buffer = pool.take(later(LONG)).unwrap();
        transfer(engine, Operation::Read, &path, false, buffer, 8192).unwrap_err()
    };
    let (ours, theirs) = (read(&uring), read(&posix));
    assert_eq!(ours.kind(), ErrorKind::Damaged);
    assert_eq!(ours.to_string(), theirs.to_string());
    assert_eq!(uring.counts().continued, 1, "the rest was asked for");
    assert_eq!(pool.free_count(), 1, "the buffer is back");
}

/// A FIFO whose other end is held: reading from it never ends.
fn fifo(directory: &Path, name: &str) -> (File, Arc<IoFile>) {
    let path = directory.join(name);
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let held = File::options().read(true).write(true).open(&path).unwrap();
    let file = IoFile::open(&path, OpenMode::Read, false).unwrap();
    (held, Arc::new(file))
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = later(LONG);
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_request_that_hangs_keeps_its_memory_until_the_kernel_lets_it_go() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (_held, file) = fifo(directory.path(), "fifo");
    let pool = StagingPool::new(4096, 4096).unwrap();
    let buffer = pool.take(later(LONG)).unwrap();
    let mut handles = uring.submit_all(requests(Operation::Read, &file, buffer, 2048));
    let begin = Instant::now();
    let error = handles.pop().unwrap().wait(later(SHORT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.os_error().is_some(), "it tells of the file system");
    assert!(begin.elapsed() >= SHORT && begin.elapsed() < LONG);
    assert_eq!(pool.free_count(), 0, "the kernel may still write there");
    drop(handles);
    // The drain cancels it, and only then the memory is free.
    wait_until("the buffer did not come back", || pool.free_count() == 1);
    wait_until("the ring did not come back", || uring.counts().held == 0);
    let counts = uring.counts();
    assert_eq!((counts.cancelled, counts.leaked), (2, 0));
    // The same engine goes on.
    let path = directory.path().join("file");
    let buffer = pool.take(later(LONG)).unwrap();
    transfer(&uring, Operation::Write, &path, false, buffer, 1024).unwrap();
}

#[test]
fn rings_are_bounded_and_the_request_beyond_is_refused_at_once() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (_held, file) = fifo(directory.path(), "fifo");
    let pool = StagingPool::new(8 * 4096, 4096).unwrap();
    let submit = || {
        let buffer = pool.take(later(LONG)).unwrap();
        uring.submit_all(requests(Operation::Read, &file, buffer, 4096))
    };
    let hanging: Vec<_> = (0..4).map(|_| submit()).collect();
    let begin = Instant::now();
    let error = submit().remove(0).wait(later(LONG)).unwrap_err();
    assert!(error.to_string().contains("all 4 rings"), "{error}");
    assert!(begin.elapsed() < LONG, "{:?}", begin.elapsed());
    assert_eq!(pool.free_count(), 4, "its buffer is back");
    drop(hanging);
    wait_until("the buffers did not come back", || pool.free_count() == 8);
    wait_until("no ring came back", || {
        submit()
            .remove(0)
            .wait(later(SHORT))
            .unwrap_err()
            .to_string()
            .contains("in time")
    });
}

#[test]
fn an_engine_goes_at_once_and_leaves_what_hangs_behind() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (held, file) = fifo(directory.path(), "fifo");
    let pool = StagingPool::new(4096, 4096).unwrap();
    let buffer = pool.take(later(LONG)).unwrap();
    let handles = uring.submit_all(requests(Operation::Read, &file, buffer, 4096));
    let begin = Instant::now();
    drop(uring);
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    // A handle outlives its engine, and what it waits for may still come.
    use std::io::Write;
    (&held).write_all(&[7; 4096]).unwrap();
    for handle in handles {
        assert_eq!(handle.wait(later(LONG)).unwrap().as_slice(), [7; 4096]);
    }
    assert_eq!(pool.free_count(), 1);
}

/// The kernel ends what a thread handed over and what has not begun when that thread ends.
#[test]
fn a_request_outlives_the_thread_that_submitted_it() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (held, file) = fifo(directory.path(), "fifo");
    let pool = StagingPool::new(4096, 4096).unwrap();
    let buffer = pool.take(later(LONG)).unwrap();
    let handles = std::thread::scope(|scope| {
        let submit = || uring.submit_all(requests(Operation::Read, &file, buffer, 4096));
        scope.spawn(submit).join().unwrap()
    });
    use std::io::Write;
    (&held).write_all(&[7; 4096]).unwrap();
    for handle in handles {
        assert_eq!(handle.wait(later(LONG)).unwrap().as_slice(), [7; 4096]);
    }
}

#[test]
fn handles_of_one_batch_may_be_waited_for_in_any_order_and_by_several_threads() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = Arc::new(IoFile::open(&path, OpenMode::CreateNew, false).unwrap());
    let pool = StagingPool::new(1 << 20, 1 << 20).unwrap();
    let buffer = pool.take(later(LONG)).unwrap();
    // More than a ring holds at a time.
    let handles = uring.submit_all(requests(Operation::Write, &file, buffer, 4096));
    assert!(handles.len() > 2 * ring::REQUESTS_MAX);
    std::thread::scope(|scope| {
        let mut sides: [Vec<IoHandle>; 2] = Default::default();
        for (index, handle) in handles.into_iter().enumerate().rev() {
            sides[index % 2].push(handle);
        }
        for side in sides {
            scope.spawn(move || {
                for handle in side {
                    assert_eq!(handle.wait(later(LONG)).unwrap().len(), 4096);
                }
            });
        }
    });
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    assert_eq!(pool.free_count(), 1);
}

#[test]
fn memory_of_another_arena_is_not_taken_for_the_registered_one() {
    let Some(uring) = engine(1) else { return };
    let directory = tempfile::tempdir().unwrap();
    let registered = StagingPool::new(8192, 4096).unwrap();
    uring.register(&registered).unwrap();
    drop(registered);
    // Quite likely at the same address.
    let pool = StagingPool::new(8192, 4096).unwrap();
    let mut buffer = pool.take(later(LONG)).unwrap();
    fill(buffer.as_mut_slice(), 9);
    let expected = buffer.as_slice().to_vec();
    let path = directory.path().join("file");
    transfer(&uring, Operation::Write, &path, false, buffer, 4096).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), expected);
    // And then it is the registered one.
    uring.register(&pool).unwrap();
    let buffer = pool.take(later(LONG)).unwrap();
    let read = transfer(&uring, Operation::Read, &path, false, buffer, 4096).unwrap();
    assert_eq!(read.as_slice(), expected);
}

#[test]
fn an_arena_is_registered_in_pieces_that_ranges_do_not_cross() {
    // Two and a half pieces; nothing of it is touched.
    let bytes = 5 << 29;
    let pool = StagingPool::new(bytes, bytes).unwrap();
    let registration = Registration::of(pool.arena());
    let lengths: Vec<usize> = registration
        .pieces()
        .iter()
        .map(|piece| piece.iov_len)
        .collect();
    assert_eq!(lengths, [1 << 30, 1 << 30, 1 << 29]);
    let mut range = pool.take(later(LONG)).unwrap();
    let first = range.split_to((1 << 30) - 4096);
    assert_eq!(registration.index_of(&first), Some(0));
    let across = range.split_to(8192);
    assert_eq!(registration.index_of(&across), None);
    assert_eq!(registration.index_of(&range.split_to(4096)), Some(1));
    let other = StagingPool::new(4096, 4096).unwrap();
    assert_eq!(
        registration.index_of(&other.take(later(LONG)).unwrap()),
        None
    );
}

#[test]
fn what_keeps_io_uring_away_is_said_in_words() {
    for (errno, words) in [
        (rustix::io::Errno::PERM, "seccomp"),
        (rustix::io::Errno::NOSYS, "no io_uring"),
        (rustix::io::Errno::NOMEM, "locked memory"),
        (rustix::io::Errno::NFILE, "files are open"),
    ] {
        let text = refusal(&std::io::Error::from(errno));
        assert!(text.contains(words), "{text}");
    }
    let old = refusal(&std::io::ErrorKind::Unsupported.into());
    assert!(old.contains("5.11"), "{old}");
}
