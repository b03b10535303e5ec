//! What the tests of a faulty mount show with `posix`, they show with `uring`; and what the engine
//! does with requests that the kernel never ends.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::duplicate_mod,
    reason = "a test that meets an error has failed; the repeated file has its own helpers"
)]

mod common;
#[path = "store_on_faulty_mount.rs"]
mod store_on_faulty_mount;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::mount;
use kvrail::ErrorKind;
use kvrail::io::{IoEngine, IoFile, IoHandle, IoRequest, OpenMode, Operation, UringEngine};
use kvrail::memory::{StagingPool, StagingRange};

const PAGE: usize = 4096;
/// Far beyond what any step takes.
const LONG: Duration = Duration::from_secs(30);
/// How long a request that hangs is waited for.
const SHORT: Duration = Duration::from_millis(100);
/// Longer than an engine that was dropped keeps looking after what hangs.
const BEYOND_GRACE: Duration = Duration::from_millis(1800);

fn engine() -> Option<UringEngine> {
    UringEngine::new(1, Arc::new(|| ()))
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()
}

fn submit(
    engine: &UringEngine,
    operation: Operation,
    path: &Path,
    direct: bool,
    buffer: StagingRange,
) -> IoHandle {
    let mode = match operation {
        Operation::Read => OpenMode::Read,
        Operation::Write => OpenMode::CreateNew,
    };
    engine.submit(IoRequest {
        operation,
        file: Arc::new(IoFile::open(path, mode, direct).unwrap()),
        offset: 0,
        buffer,
    })
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_file_system_that_cannot_do_without_waiting_is_waited_for_by_the_kernel() {
    let (Some(mounted), Some(engine)) = (mount(30), engine()) else {
        return;
    };
    let path = mounted.path().join("file");
    let pool = StagingPool::new(4 * PAGE, 4 * PAGE).unwrap();
    let mut buffer = pool.take(Instant::now() + LONG).unwrap();
    let bytes = buffer.as_mut_slice().iter_mut().enumerate();
    bytes.for_each(|(index, byte)| *byte = (index % 251) as u8);
    let expected = buffer.as_slice().to_vec();
    // Submitting must not wait for the file system, although its files are opened with O_NONBLOCK
    // and it knows no reads and writes that do not wait.
    mounted.set("read,write * delay=600ms");
    let begin = Instant::now();
    let written = submit(&engine, Operation::Write, &path, true, buffer);
    let submitted = begin.elapsed();
    assert!(submitted < Duration::from_millis(400), "{submitted:?}");
    let mut buffer = written.wait(Instant::now() + LONG).unwrap();
    buffer.as_mut_slice().fill(0);
    assert!(begin.elapsed() >= Duration::from_millis(600));
    let begin = Instant::now();
    let read = submit(&engine, Operation::Read, &path, true, buffer);
    let submitted = begin.elapsed();
    assert!(submitted < Duration::from_millis(400), "{submitted:?}");
    assert_eq!(
        read.wait(Instant::now() + LONG).unwrap().as_slice(),
        expected
    );
}

/// Submits a read that hangs in the kernel and gives it up.
fn hang(engine: &UringEngine, pool: &StagingPool, path: &Path) {
    let buffer = pool.take(Instant::now() + LONG).unwrap();
    let begin = Instant::now();
    let handle = submit(engine, Operation::Read, path, false, buffer);
    let error = handle.wait(begin + SHORT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    wait_until("nobody looks after it", || engine.counts().held == 1);
}

#[test]
fn what_hangs_in_the_kernel_keeps_its_memory_and_gives_it_back_when_it_ends() {
    let (Some(mounted), Some(engine)) = (mount(31), engine()) else {
        return;
    };
    let path = mounted.path().join("file");
    std::fs::write(&path, [5; PAGE]).unwrap();
    let pool = StagingPool::new(2 * PAGE, PAGE).unwrap();
    mounted.set("read * hang");
    hang(&engine, &pool, &path);
    thread::sleep(SHORT);
    assert_eq!(pool.free_count(), 1, "the kernel has it still");
    assert_eq!(engine.counts().cancelled, 1);
    // Others go on meanwhile, with what is left.
    let other = mounted.source().join("other");
    let buffer = pool.take(Instant::now() + LONG).unwrap();
    let written = submit(&engine, Operation::Write, &other, false, buffer);
    drop(written.wait(Instant::now() + LONG).unwrap());
    mounted.heal();
    wait_until("the buffer did not come back", || pool.free_count() == 2);
    wait_until("the ring did not come back", || engine.counts().held == 0);
    assert_eq!(engine.counts().leaked, 0);
}

#[test]
fn an_engine_that_goes_leaves_the_memory_to_what_hangs_for_good() {
    let (Some(mounted), Some(engine)) = (mount(32), engine()) else {
        return;
    };
    let path = mounted.path().join("file");
    std::fs::write(&path, [5; PAGE]).unwrap();
    let pool = StagingPool::new(PAGE, PAGE).unwrap();
    mounted.set("read * hang");
    hang(&engine, &pool, &path);
    let begin = Instant::now();
    drop(engine);
    assert!(
        begin.elapsed() < Duration::from_millis(500),
        "{:?}",
        begin.elapsed()
    );
    thread::sleep(BEYOND_GRACE);
    // The kernel writes there now, and nobody else may have it.
    mounted.heal();
    thread::sleep(SHORT);
    assert_eq!(pool.free_count(), 0);
}
