//! cuFile on a mock: registration, transfers, faults, balance.
#![expect(unsafe_code, reason = "hands device addresses of the test to cuFile")]
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvrail_cuda::{Context, CuFile, CuFileDriver, Cuda, DeviceMemory, Priority, RegisteredMemory};
use mock_support::Mocks;

const BYTES: usize = 64 << 10;

struct Bench {
    mocks: Mocks,
    driver: CuFileDriver,
    context: Context,
    memory: DeviceMemory,
    file: File,
    _folder: tempfile::TempDir,
}

fn start() -> Bench {
    let mocks = Mocks::load();
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    let context = cuda.retain_primary(0).unwrap();
    let library = CuFile::load(&[mocks.cufile().to_path_buf()]).unwrap();
    assert_eq!(
        (library.version(), library.has_vectored()),
        (Some((1, 20)), true)
    );
    let folder = tempfile::tempdir().unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(folder.path().join("file"))
        .unwrap();
    Bench {
        driver: library.open_driver(&context).unwrap(),
        memory: context.allocate_at_page(2 * BYTES).unwrap(),
        context,
        mocks,
        file,
        _folder: folder,
    }
}

impl Bench {
    fn fill(&self, byte: u8) {
        let bytes = vec![byte; 2 * BYTES];
        let stream = self.context.stream(Priority::Low).unwrap();
        // SAFETY: the memory is as long.
        unsafe { stream.copy_to_device(self.memory.address(), bytes.as_ptr(), bytes.len()) }
            .unwrap();
        stream.synchronize().unwrap();
    }

    fn byte(&self, offset: usize) -> u8 {
        // SAFETY: one byte of the allocation, by its alias.
        unsafe {
            *self
                .mocks
                .translate(self.memory.address() + offset as u64, 1)
        }
    }
}

#[test]
fn what_is_written_is_read_back_and_everything_is_given_back() {
    let bench = start();
    let address = bench.memory.address();
    // SAFETY: the memory lives longer.
    let buffer = unsafe {
        bench
            .driver
            .register_buffer(&bench.context, address, 2 * BYTES)
    }
    .unwrap();
    // SAFETY: refused.
    let again = unsafe {
        bench
            .driver
            .register_buffer(&bench.context, address, 2 * BYTES)
    };
    assert_eq!(again.unwrap_err().code(), Some(5023));
    let handle = bench.driver.register_file(bench.file.as_fd()).unwrap();
    assert_eq!(
        bench
            .driver
            .register_file(bench.file.as_fd())
            .unwrap_err()
            .code(),
        Some(5028)
    );
    bench.fill(7);
    // SAFETY: the range lies in the registered memory.
    let written = unsafe { handle.write(address, BYTES, 4096, 0) };
    assert_eq!(written.unwrap(), BYTES);
    bench.fill(1);
    // SAFETY: as above.
    let read = unsafe { handle.read(address, BYTES, 4096, BYTES) };
    assert_eq!(read.unwrap(), BYTES);
    assert_eq!(
        (
            bench.byte(BYTES - 1),
            bench.byte(BYTES),
            bench.byte(2 * BYTES - 1)
        ),
        (1, 7, 7)
    );
    // SAFETY: as above; the file ends before.
    let behind = unsafe { handle.read(address, BYTES, 1 << 20, 0) };
    assert_eq!(behind.unwrap(), 0);
    // SAFETY: the library refuses a range outside the registration.
    let outside = unsafe { handle.read(address, BYTES, 0, BYTES + 4096) };
    assert_eq!(outside.unwrap_err().code(), Some(5014));
    let Bench { mocks, driver, .. } = bench;
    drop(driver);
    drop(handle);
    drop(buffer);
    assert_eq!(mocks.balance().1, 0);
}

#[test]
fn faults_are_values() {
    let bench = start();
    let address = bench.memory.address();
    bench.mocks.script_cufile(
        "cuFileBufRegister nth=1 error=5036\ncuFileHandleRegister nth=1 error=5027\n\
         cuFileRead nth=1 error=5030\ncuFileRead nth=2 short=4096\ncuFileWrite nth=1 error=5048",
    );
    // SAFETY: the memory lives longer.
    let refused =
        unsafe { bench.driver.register_buffer(&bench.context, address, BYTES) }.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "cuFileBufRegister: 5036, GPU memory cannot be pinned for I/O (BAR1 full?)"
    );
    // SAFETY: as above.
    let _buffer = unsafe { bench.driver.register_buffer(&bench.context, address, BYTES) }.unwrap();
    let refused = bench.driver.register_file(bench.file.as_fd()).unwrap_err();
    assert!(refused.to_string().contains("no udev record"), "{refused}");
    let handle = bench.driver.register_file(bench.file.as_fd()).unwrap();
    // SAFETY: the range lies in the registered memory.
    let write = || unsafe { handle.write(address, BYTES, 0, 0) };
    // SAFETY: as above.
    let read = || unsafe { handle.read(address, BYTES, 0, 0) };
    assert_eq!(write().unwrap_err().code(), Some(5048));
    assert_eq!(write().unwrap(), BYTES);
    assert_eq!(read().unwrap_err().code(), Some(5030));
    assert_eq!(read().unwrap(), 4096);
    assert_eq!(read().unwrap(), BYTES);
    assert_eq!(bench.mocks.cufile_calls("cuFileRead"), 3);
}

#[test]
fn a_process_that_was_forked_off_leaves_the_driver_alone() {
    let bench = start();
    let base = bench.memory.address();
    // SAFETY: the memory outlives the registration.
    let registered = unsafe {
        bench
            .driver
            .register_buffer(&bench.context, base, 2 * BYTES)
    }
    .unwrap();
    let handle = bench.driver.register_file(bench.file.as_fd()).unwrap();
    let balance = bench.mocks.balance().1;
    // SAFETY: the child calls nothing but what is tested, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = bench.driver.register_file(bench.file.as_fd()).is_err()
            // SAFETY: refused before anything is touched.
            && unsafe { handle.write(base, BYTES, 0, 0) }.is_err()
            // SAFETY: as above.
            && unsafe { bench.driver.register_buffer(&bench.context, base, BYTES) }.is_err();
        drop(handle);
        drop(registered);
        // The child's copy of the mock counts what it was asked to give back.
        let untouched = bench.mocks.balance().1 == balance;
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(i32::from(!(refused && untouched))) };
    }
    assert!(child > 0, "no child");
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child used the driver of its parent");
    bench.fill(7);
    // SAFETY: the first part of registered memory of the test.
    let written = bench
        .context
        .run(|| unsafe { handle.write(base, BYTES, 0, 0) });
    assert_eq!(written.unwrap(), BYTES, "the parent goes on");
}

#[test]
fn memory_of_our_own_is_read_and_written_inside_its_bounds_only() {
    let bench = start();
    bench.fill(9);
    let Bench {
        mocks,
        driver,
        memory,
        file,
        ..
    } = bench;
    let address = memory.address();
    let mut memory = RegisteredMemory::new(&driver, memory).unwrap();
    let handle = driver.register_file(file.as_fd()).unwrap();
    assert_eq!(memory.write(&handle, 0..BYTES, 4096).unwrap(), BYTES);
    let byte = |offset| mocks.translate(address + offset as u64, 1);
    // SAFETY: one byte of the allocation, by its alias.
    unsafe { byte(BYTES).write(1) };
    // SAFETY: as above.
    unsafe { byte(2 * BYTES - 1).write(1) };
    assert_eq!(memory.read(&handle, BYTES..2 * BYTES, 4096).unwrap(), BYTES);
    // SAFETY: as above.
    let first = unsafe { byte(BYTES).read() };
    // SAFETY: as above.
    let last = unsafe { byte(2 * BYTES - 1).read() };
    assert_eq!((first, last), (9, 9));
    let calls = mocks.cufile_calls("cuFileRead");
    for range in [BYTES..3 * BYTES, 2 * BYTES..2 * BYTES + 1, 0..usize::MAX] {
        assert!(memory.read(&handle, range.clone(), 0).is_err(), "{range:?}");
        assert!(
            memory.write(&handle, range.clone(), 0).is_err(),
            "{range:?}"
        );
    }
    assert_eq!(mocks.cufile_calls("cuFileRead"), calls);
    drop((memory, handle, driver));
    assert_eq!(mocks.balance().1, 0);
}

const SCRIPT: &str = "KVRAIL_TEST_CUFILE_SCRIPT";
const BEGUN: &str = "a write has begun";

/// Not a test of its own: ends while another thread is in a call of cuFile.
#[test]
#[ignore = "runs as the child of the test of the exit"]
fn child() {
    let Ok(script) = std::env::var(SCRIPT) else {
        eprintln!("skipped: only meant to be started by the test of the exit");
        return;
    };
    // Kept for ever: the call in the other thread uses it.
    let bench: &Bench = Box::leak(Box::new(start()));
    let address = bench.memory.address();
    // SAFETY: the memory lives longer.
    let buffer = unsafe { bench.driver.register_buffer(&bench.context, address, BYTES) }.unwrap();
    std::mem::forget(buffer);
    let file = bench.driver.register_file(bench.file.as_fd()).unwrap();
    bench.mocks.script_cufile(&script);
    std::thread::spawn(move || {
        // SAFETY: the memory is registered, and nobody else touches it.
        let written = bench
            .context
            .run(|| unsafe { file.write(address, BYTES, 0, 0) });
        println!("{written:?}");
    });
    while bench.mocks.cufile_calls("cuFileWrite") == 0 {
        std::thread::yield_now();
    }
    println!("{BEGUN}");
    std::process::exit(0);
}

/// Returns how long a process whose call meets `script` takes to end.
fn time_of_exit(script: &str) -> Duration {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(SCRIPT, script)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = lines
        .map_while(Result::ok)
        .find(|line| line.contains(BEGUN))
        .map(|_| Instant::now());
    let status = child.wait().unwrap();
    assert!(status.success(), "{script}: {status}");
    begun.unwrap().elapsed()
}

#[test]
fn the_exit_of_a_process_waits_for_calls_but_not_for_ever() {
    let took = time_of_exit("cuFileWrite delay_ms=600");
    assert!(
        took > Duration::from_millis(400),
        "did not wait: {took:.2?}"
    );
    let took = time_of_exit("cuFileWrite hang");
    assert!(
        took > Duration::from_millis(800),
        "did not wait: {took:.2?}"
    );
    assert!(took < Duration::from_secs(10), "{took:.2?}");
}
