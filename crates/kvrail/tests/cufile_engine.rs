//! The cufile engine on mocks: whole transfers, and every failure as an error with its path.
#![expect(
    unsafe_code,
    reason = "registers the mock's device memory, looks into it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail::io::{
    Cancelled, CufileEngine, IoEngine, IoFile, IoRequest, OpenMode, Operation, PieceHandle,
    PieceRequest,
};
use kvrail::memory::{DeviceArena, RegisteredRegion, StagingPool, StagingRange};
use kvrail::{Device, ErrorKind, Region};
use kvrail_cuda::{Context, CuFile, CuFileDriver, Cuda, DeviceMemory};
use mock_support::Mocks;

const SLOT: usize = 64 << 10;

struct Bench {
    driver: CuFileDriver,
    context: Context,
    engine: CufileEngine,
    pool: StagingPool<DeviceArena>,
    mocks: Mocks,
    folder: tempfile::TempDir,
}

fn start() -> Bench {
    start_with(SLOT)
}

fn start_with(slot: usize) -> Bench {
    let mocks = Mocks::load();
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    let context = cuda.retain_primary(0).unwrap();
    let library = CuFile::load(&[mocks.cufile().to_path_buf()]).unwrap();
    let driver = library.open_driver(&context).unwrap();
    let memory = context.allocate_at_page(4 * slot).unwrap();
    let arena = DeviceArena::registered(memory, &driver).unwrap();
    Bench {
        engine: CufileEngine::new(&driver, &context, 2, &(Arc::new(|| ()) as _)).unwrap(),
        driver,
        context,
        pool: StagingPool::over(arena, slot).unwrap(),
        mocks,
        folder: tempfile::tempdir().unwrap(),
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

impl Bench {
    fn submit(
        &self,
        operation: Operation,
        file: &Arc<IoFile>,
        buffer: StagingRange<DeviceArena>,
        deadline: Instant,
    ) -> kvrail::Result<StagingRange<DeviceArena>> {
        let request = IoRequest {
            operation,
            file: Arc::clone(file),
            offset: 4096,
            buffer,
        };
        self.engine.submit(request).wait(deadline)
    }

    /// Fills a range, by the mock's alias.
    fn fill(&self, range: &StagingRange<DeviceArena>, byte: u8) {
        let start = self.mocks.translate(range.address(), range.len());
        // SAFETY: the mock's memory, of which the test holds this range.
        unsafe { start.write_bytes(byte, range.len()) };
    }

    /// Returns whether all bytes of a range are `byte`.
    fn holds(&self, range: &StagingRange<DeviceArena>, byte: u8) -> bool {
        let start = self.mocks.translate(range.address(), range.len());
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(start, range.len()) };
        bytes.iter().all(|found| *found == byte)
    }

    fn create(&self, name: &str) -> Arc<IoFile> {
        let path = self.folder.path().join(name);
        Arc::new(IoFile::open(&path, OpenMode::CreateNew, false).unwrap())
    }

    fn open(&self, name: &str) -> Arc<IoFile> {
        let path = self.folder.path().join(name);
        Arc::new(IoFile::open(&path, OpenMode::Read, false).unwrap())
    }
}

#[test]
fn slots_go_to_files_and_back_and_everything_is_given_back() {
    let bench = start();
    let file = bench.create("file");
    let buffer = bench.pool.take(soon()).unwrap();
    bench.fill(&buffer, 7);
    let buffer = bench
        .submit(Operation::Write, &file, buffer, soon())
        .unwrap();
    drop((file, buffer));
    let length = std::fs::metadata(bench.folder.path().join("file"))
        .unwrap()
        .len();
    assert_eq!(length, 4096 + SLOT as u64);
    // Not the slot at the arena's start: offsets count from the registered address.
    let first = bench.pool.take(soon()).unwrap();
    let second = bench.pool.take(soon()).unwrap();
    bench.fill(&first, 1);
    let file = bench.open("file");
    let second = bench
        .submit(Operation::Read, &file, second, soon())
        .unwrap();
    assert!(bench.holds(&second, 7));
    assert!(bench.holds(&first, 1));
    drop((file, first, second));
    let Bench {
        driver,
        context,
        engine,
        pool,
        mocks,
        ..
    } = bench;
    drop((pool, engine, driver, context));
    // At once: the process may end now, and cuFile's memory with it.
    assert_eq!(mocks.balance(), (0, 0));
}

#[test]
fn every_failure_is_an_error_with_function_number_and_path() {
    let faults = [
        (Operation::Write, "cuFileHandleRegister error=5027", "5027"),
        (Operation::Write, "cuFileWrite error=5030", "5030"),
        (
            Operation::Write,
            "cuFileWrite short=4096",
            "expected 65536 bytes, got 4096",
        ),
        (Operation::Read, "cuFileRead error=5048", "5048"),
        (
            Operation::Read,
            "cuFileRead short=0",
            "expected 65536 bytes, got 0",
        ),
    ];
    let bench = start();
    let whole = bench.create("whole");
    let buffer = bench.pool.take(soon()).unwrap();
    drop(
        bench
            .submit(Operation::Write, &whole, buffer, soon())
            .unwrap(),
    );
    drop(whole);
    for (index, (operation, script, expected)) in faults.into_iter().enumerate() {
        let name = index.to_string();
        let file = match operation {
            Operation::Write => bench.create(&name),
            Operation::Read => bench.open("whole"),
        };
        bench.mocks.script_cufile(script);
        let buffer = bench.pool.take(soon()).unwrap();
        let error = bench.submit(operation, &file, buffer, soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gpu, "{script}");
        assert!(error.to_string().contains(expected), "{script}: {error}");
        let path = file
            .path()
            .file_name()
            .map(Path::new)
            .unwrap()
            .display()
            .to_string();
        assert!(error.to_string().contains(&path), "{script}: {error}");
    }
    assert_eq!(
        bench.pool.free_count(),
        bench.pool.slot_count(),
        "a slot was lost"
    );
}

#[test]
fn a_call_that_hangs_costs_its_slot_and_no_wait_beyond_the_deadline() {
    let bench = start();
    bench.mocks.script_cufile("cuFileWrite nth=1 hang");
    let file = bench.create("hanging");
    let buffer = bench.pool.take(soon()).unwrap();
    let readers = buffer.share();
    let started = Instant::now();
    let deadline = started + Duration::from_millis(100);
    let error = bench
        .submit(Operation::Write, &file, buffer, deadline)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(5));
    // The bytes can still be read for another way; the slot is not given to anybody else.
    assert_eq!(readers.len(), SLOT);
    drop(readers);
    assert_eq!(bench.pool.free_count(), bench.pool.slot_count() - 1);
    let other = bench.create("other");
    let buffer = bench.pool.take(soon()).unwrap();
    bench
        .submit(Operation::Write, &other, buffer, soon())
        .unwrap();
}

#[test]
fn a_small_request_does_not_wait_for_large_ones() {
    let bench = start_with(2 << 20);
    // Both threads for large requests, one request each.
    bench
        .mocks
        .script_cufile("cuFileWrite nth=1 hang\ncuFileWrite nth=2 hang");
    let (file, large) = (bench.create("large"), bench.pool.take(soon()).unwrap());
    let waits_for = |buffer| {
        let deadline = Instant::now() + Duration::from_millis(300);
        bench.submit(Operation::Write, &file, buffer, deadline)
    };
    let mut slots = vec![large];
    slots.extend((0..2).map(|_| bench.pool.take(soon()).unwrap()));
    for buffer in slots {
        assert_eq!(
            waits_for(buffer).unwrap_err().kind(),
            ErrorKind::TimedOut,
            "no thread is left for large requests"
        );
    }
    let small = bench.pool.take(soon()).unwrap().split_to(SLOT);
    bench.fill(&small, 3);
    let other = bench.create("small");
    bench
        .submit(Operation::Write, &other, small, soon())
        .unwrap();
    let bytes = std::fs::read(bench.folder.path().join("small")).unwrap();
    assert!(bytes[4096..].iter().all(|byte| *byte == 3));
}

/// Memory of a KV cache that cuFile knows, full of a byte.
struct Blocks {
    memory: Arc<DeviceMemory>,
    registered: Arc<RegisteredRegion>,
}

impl Blocks {
    const BYTES: usize = 4 * SLOT;

    fn new(bench: &Bench, byte: u8) -> Self {
        let memory = Arc::new(bench.context.allocate_at_page(Self::BYTES).unwrap());
        // SAFETY: the allocation has these bytes and lives as long as the region's owner.
        let region = unsafe {
            Region::from_raw(
                memory.address() as usize,
                Self::BYTES,
                Device::Cuda(0),
                Arc::clone(&memory) as _,
            )
        };
        let registered = RegisteredRegion::new(region.unwrap(), &bench.driver, &bench.context);
        let blocks = Self {
            memory,
            registered: Arc::new(registered.unwrap()),
        };
        let start = bench.mocks.translate(blocks.memory.address(), Self::BYTES);
        // SAFETY: the mock's memory, which nobody else uses yet.
        unsafe { start.write_bytes(byte, Self::BYTES) };
        blocks
    }

    /// Returns the byte that a block is full of.
    fn block(&self, bench: &Bench, index: usize) -> u8 {
        let address = self.memory.address() + (index * SLOT) as u64;
        let start = bench.mocks.translate(address, SLOT);
        // SAFETY: nobody writes to it any more.
        let bytes = unsafe { std::slice::from_raw_parts(start, SLOT) };
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    fn read(&self, bench: &Bench, file: &Arc<IoFile>, index: usize) -> PieceHandle {
        bench.engine.submit_pieces(PieceRequest {
            operation: Operation::Read,
            file: Arc::clone(file),
            offset: 4096,
            memory: Arc::clone(&self.registered),
            pieces: std::iter::once(index * SLOT..(index + 1) * SLOT).collect(),
        })
    }
}

/// A file of one block, full of a byte.
fn file_of(bench: &Bench, name: &str, byte: u8) -> Arc<IoFile> {
    let buffer = bench.pool.take(soon()).unwrap();
    bench.fill(&buffer, byte);
    let file = bench.create(name);
    bench
        .submit(Operation::Write, &file, buffer, soon())
        .unwrap();
    bench.open(name)
}

#[test]
fn a_transfer_that_has_not_begun_can_be_cancelled_and_touches_nothing() {
    let bench = start();
    let file = file_of(&bench, "chunk", 7);
    let blocks = Blocks::new(&bench, 0xA5);
    // All threads, also the one for small requests.
    let slow: Vec<String> = (1..=3)
        .map(|nth| format!("cuFileReadv nth={nth} delay_ms=1000"))
        .collect();
    bench.mocks.script_cufile(&slow.join("\n"));
    let calls = bench.mocks.cufile_calls("cuFileReadv");
    let begun: Vec<PieceHandle> = (0..3).map(|at| blocks.read(&bench, &file, at)).collect();
    let waiting = blocks.read(&bench, &file, 3);
    let in_a_moment = Instant::now() + Duration::from_millis(300);
    assert!(waiting.wait(in_a_moment).is_none());
    assert_eq!(waiting.cancel(), Some(Cancelled::Waiting));
    for handle in &begun {
        assert_eq!(handle.cancel(), None, "cuFile has the memory");
    }
    for (at, handle) in begun.into_iter().enumerate() {
        handle.wait(soon()).unwrap().unwrap();
        assert_eq!(blocks.block(&bench, at), 7);
    }
    let error = waiting.wait(soon()).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert_eq!(blocks.block(&bench, 3), 0xA5);
    assert_eq!(bench.mocks.cufile_calls("cuFileReadv"), calls + 3);
}

#[test]
fn a_transfer_whose_file_cufile_does_not_take_up_can_be_cancelled() {
    let bench = start();
    let file = file_of(&bench, "chunk", 7);
    let blocks = Blocks::new(&bench, 0xA5);
    bench
        .mocks
        .script_cufile("cuFileHandleRegister nth=1 delay_ms=600");
    let handle = blocks.read(&bench, &file, 0);
    let in_a_moment = Instant::now() + Duration::from_millis(200);
    assert!(handle.wait(in_a_moment).is_none());
    assert_eq!(handle.cancel(), Some(Cancelled::Taken));
    let error = handle.wait(soon()).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert_eq!(blocks.block(&bench, 0), 0xA5);
}
