//! NVIDIA's own libcufile on the mock of libcuda, so without a GPU: each version that mock-support
//! finds, in a process of its own.
#![expect(unsafe_code, reason = "hands device memory of the mock to cuFile")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::ffi::{c_int, c_void};
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kvrail_cuda::{
    Context, CuFile, CuFileDriver, Cuda, DeviceMemory, DriverSettings, Priority, RegisteredMemory,
    TRANSFER_BYTES_MAX,
};
use mock_support::{Mocks, RealCufile};

/// Without a GPU that has a direct path.
const SETTINGS: DriverSettings = DriverSettings {
    allow_compatibility: true,
    use_p2pdma: true,
};
const PAGE: usize = 4096;
const BYTES: usize = 1 << 20;
/// Returns the libraries at hand, or says why there is none.
fn libraries() -> Vec<RealCufile> {
    RealCufile::find().unwrap_or_else(|reason| {
        eprintln!("skipped: {reason}");
        Vec::new()
    })
}

/// Runs a test of this program with each library.
fn with_each(test: &str) {
    for library in libraries() {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        library.run(test, folder.path());
    }
}

#[test]
fn the_real_library_has_every_function_and_knows_its_version() {
    for real in libraries() {
        let library = CuFile::load(&[real.library().to_path_buf()]).unwrap();
        let version = library.version().unwrap();
        eprintln!(
            "libcufile {}.{}, vectored: {}",
            version.0,
            version.1,
            library.has_vectored(),
        );
        assert_eq!(version.0, 1, "{version:?}");
        assert_eq!(
            library.has_vectored(),
            version >= (1, 20),
            "Readv and Writev came with 1.20"
        );
    }
}

#[test]
fn the_real_library_moves_bytes_between_device_memory_and_files() {
    with_each("transfers");
}

#[test]
fn the_real_library_takes_the_settings() {
    with_each("settings");
}

#[test]
fn the_mock_answers_as_the_real_library() {
    with_each("answers");
}

/// The mock of libcuda, and the real library on it.
struct Bench {
    mocks: Mocks,
    context: Context,
    library: CuFile,
}

fn start() -> (Bench, CuFileDriver) {
    let bench = start_unopened();
    let driver = bench.library.open_driver_with(&bench.context, SETTINGS);
    (bench, driver.unwrap())
}

fn start_unopened() -> Bench {
    let mocks = Mocks::load();
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    Bench {
        context: cuda.retain_primary(0).unwrap(),
        library: CuFile::load(&[RealCufile::of_this_process().unwrap()]).unwrap(),
        mocks,
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// Bytes of which no two pages look alike.
fn noise(seed: usize, bytes: usize) -> Vec<u8> {
    let byte = |index: usize| (index.wrapping_add(seed << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..bytes).map(|index| (byte(index) >> 56) as u8).collect()
}

fn fill(memory: &DeviceMemory, bytes: &[u8]) {
    let stream = memory.context().stream(Priority::Low).unwrap();
    // SAFETY: the caller's bytes fit the memory; waited for.
    unsafe { stream.copy_to_device(memory.address(), bytes.as_ptr(), bytes.len()) }.unwrap();
    stream.synchronize().unwrap();
}

fn content(memory: &DeviceMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.bytes()];
    let stream = memory.context().stream(Priority::Low).unwrap();
    // SAFETY: as in `fill`.
    unsafe { stream.copy_to_host(bytes.as_mut_ptr(), memory.address(), bytes.len()) }.unwrap();
    stream.synchronize().unwrap();
    bytes
}

#[test]
#[ignore = "started by the tests above in a process of its own"]
fn transfers() {
    let (bench, driver) = start();
    one_by_one(&bench, &driver);
    vectored(&bench, &driver);
    from_many_threads(&bench, &driver);
    eprintln!("bytes were written, read and compared");
}

/// The largest transfer and others, at offsets, to the end of a file and beyond it.
fn one_by_one(bench: &Bench, driver: &CuFileDriver) {
    let memory = bench
        .context
        .allocate_at_page(2 * TRANSFER_BYTES_MAX)
        .unwrap();
    let source = noise(1, 2 * TRANSFER_BYTES_MAX);
    fill(&memory, &source);
    let base = memory.address();
    // SAFETY: the memory lives longer than the registration.
    let registered = unsafe { driver.register_buffer(&bench.context, base, memory.bytes()) };
    let registered = registered.unwrap();
    let path = Path::new("one");
    let file = open(path);
    let handle = driver.register_file(file.as_fd()).unwrap();
    for (bytes, file_offset) in [(PAGE, 0), (BYTES, PAGE), (TRANSFER_BYTES_MAX, BYTES + PAGE)] {
        // SAFETY: both ranges lie in the registered memory.
        let written = unsafe { handle.write(base, bytes, file_offset as u64, PAGE) };
        assert_eq!(written.unwrap(), bytes);
        let on_disk = fs::read(path).unwrap();
        assert!(on_disk[file_offset..] == source[PAGE..PAGE + bytes]);
        // SAFETY: as above.
        let read = unsafe { handle.read(base, bytes, file_offset as u64, TRANSFER_BYTES_MAX) };
        assert_eq!(read.unwrap(), bytes);
        let found = content(&memory);
        assert!(found[..TRANSFER_BYTES_MAX] == source[..TRANSFER_BYTES_MAX]);
        let (moved, behind) = found[TRANSFER_BYTES_MAX..].split_at(bytes);
        assert!(moved == &source[PAGE..PAGE + bytes], "{bytes} bytes");
        assert!(behind == &source[TRANSFER_BYTES_MAX + bytes..]);
        fill(&memory, &source);
    }
    let end = fs::metadata(path).unwrap().len();
    // SAFETY: as above; the file ends in between.
    let short = unsafe { handle.read(base, BYTES, end - PAGE as u64, 0) };
    assert_eq!(short.unwrap(), PAGE, "a read that meets the end is short");
    // SAFETY: as above; the file ends before.
    let behind = unsafe { handle.read(base, BYTES, end + BYTES as u64, 0) };
    assert_eq!(behind.unwrap(), 0);
    drop((handle, registered));
}

/// One call that moves many pieces, where the library has it.
fn vectored(bench: &Bench, driver: &CuFileDriver) {
    const PIECES: usize = 16;
    let memory = bench.context.allocate_at_page(2 * BYTES).unwrap();
    let source = noise(2, 2 * BYTES);
    fill(&memory, &source);
    let base = memory.address();
    // SAFETY: the memory lives longer than the registration.
    let registered = unsafe { driver.register_buffer(&bench.context, base, memory.bytes()) };
    let registered = registered.unwrap();
    let path = Path::new("vectored");
    let file = open(path);
    let handle = driver.register_file(file.as_fd()).unwrap();
    let each = BYTES / PIECES;
    // Backwards, so that the order of the pieces is seen.
    let pieces = |offset: usize| -> Vec<(u64, usize)> {
        let piece = |index| (base + (offset + index * each) as u64, each);
        (0..PIECES).rev().map(piece).collect()
    };
    // SAFETY: the pieces lie in the registered memory.
    let written = unsafe { handle.write_vectored(&pieces(0), 0) };
    if !bench.library.has_vectored() {
        eprintln!("skipped: {}", written.unwrap_err());
        return;
    }
    assert_eq!(written.unwrap(), BYTES);
    // SAFETY: as above.
    let read = unsafe { handle.read_vectored(&pieces(BYTES), 0) };
    assert_eq!(read.unwrap(), BYTES);
    let found = content(&memory);
    assert!(found[..BYTES] == source[..BYTES] && found[BYTES..] == source[..BYTES]);
    assert!(fs::read(path).unwrap()[..each] == source[BYTES - each..BYTES]);
    drop((handle, registered));
}

/// Threads on two devices, each with memory and files of its own, where no context is current.
fn from_many_threads(bench: &Bench, driver: &CuFileDriver) {
    let cuda = bench.context.cuda();
    std::thread::scope(|scope| {
        for index in 0..8 {
            let context = cuda.retain_primary(index % 2).unwrap();
            scope.spawn(move || {
                let memory = context.allocate_at_page(2 * BYTES).unwrap();
                let address = memory.address();
                let source = noise(10 + index, 2 * BYTES);
                fill(&memory, &source);
                let mut memory = RegisteredMemory::new(driver, memory).unwrap();
                for round in 0..8 {
                    let path = format!("thread-{index}-{round}");
                    let file = open(Path::new(&path));
                    let handle = driver.register_file(file.as_fd()).unwrap();
                    let moved = memory.write(&handle, 0..BYTES, 0).unwrap();
                    assert_eq!(moved, BYTES);
                    assert_eq!(memory.read(&handle, BYTES..2 * BYTES, 0).unwrap(), BYTES);
                }
                let mut found = vec![0; 2 * BYTES];
                let stream = context.stream(Priority::Low).unwrap();
                // SAFETY: the memory is as long and alive.
                unsafe { stream.copy_to_host(found.as_mut_ptr(), address, found.len()) }.unwrap();
                stream.synchronize().unwrap();
                assert!(found[..BYTES] == source[..BYTES]);
                assert!(found[BYTES..] == source[..BYTES]);
            });
        }
    });
}

#[test]
#[ignore = "started by the tests above in a process of its own"]
fn settings() {
    type Switch = unsafe extern "C" fn(c_int, *mut bool) -> Status;
    type Size = unsafe extern "C" fn(c_int, *mut usize) -> Status;
    // As NVIDIA's packages have it, or tighter: what is set goes before.
    fs::write(
        "cufile.json",
        r#"{"properties": {"allow_compat_mode": false, "use_pci_p2pdma": false,
            "max_direct_io_size_kb": 1024, "max_device_pinned_mem_size_kb": 65536}}"#,
    )
    .unwrap();
    // SAFETY: no other thread of this process reads the environment now.
    unsafe { std::env::set_var("CUFILE_ENV_PATH_JSON", "cufile.json") };
    let bench = start_unopened();
    // SAFETY: the library is loaded already.
    let raw = unsafe { libloading::Library::new(bench.library.library()) }.unwrap();
    // SAFETY: the type is that of cufile.h.
    let Ok(switch) = (unsafe { raw.get::<Switch>(b"cuFileGetParameterBool") }) else {
        eprintln!("skipped: this version takes no settings");
        return;
    };
    // SAFETY: as above.
    let size = unsafe { raw.get::<Size>(b"cuFileGetParameterSizeT") }.unwrap();
    let driver = bench.library.open_driver_with(&bench.context, SETTINGS);
    let total = bench.context.memory_info().unwrap().1;
    for (number, expected) in [(5, TRANSFER_BYTES_MAX >> 10), (8, total >> 10)] {
        let mut found = 0;
        // SAFETY: the pointer is to a live number.
        unsafe { size(number, &raw mut found) };
        assert_eq!(found, expected, "size {number}");
    }
    for number in [1, 7] {
        let mut found = false;
        // SAFETY: the pointer is to a live switch.
        unsafe { switch(number, &raw mut found) };
        assert!(found, "switch {number}");
    }
    drop(driver.unwrap());
}

#[test]
#[ignore = "started by the tests above in a process of its own"]
fn answers() {
    let (bench, real) = start();
    let mock = CuFile::load(&[bench.mocks.cufile().to_path_buf()]).unwrap();
    let driver = mock.open_driver(&bench.context).unwrap();
    let context = &bench.context;
    // On a thread of its own: a call that fails may leave a context behind.
    let real = std::thread::scope(|scope| {
        let real = || answers_of(&bench.library, &real, context, Path::new("real"));
        scope.spawn(real).join().unwrap()
    });
    let mock = answers_of(&mock, &driver, context, Path::new("mock"));
    assert_eq!(mock, real);
}

/// `CUfileError_t`.
#[repr(C)]
struct Status {
    error: c_int,
    cuda: c_int,
}

/// What a library answers to calls that kvrail makes, or must not make.
fn answers_of(
    library: &CuFile,
    driver: &CuFileDriver,
    context: &Context,
    path: &Path,
) -> Vec<(&'static str, Result<usize, Option<i32>>)> {
    type Register = unsafe extern "C" fn(*const c_void, usize, c_int) -> Status;
    let memory = context.allocate_at_page(2 * BYTES).unwrap();
    fill(&memory, &noise(3, 2 * BYTES));
    let base = memory.address();
    let mut answers = Vec::new();
    let mut say = |what, answer: kvrail_cuda::Result<usize>| {
        answers.push((what, answer.map_err(|error| error.code())));
    };
    // Around the binding, which makes a context current.
    // SAFETY: the library is loaded already.
    let raw = unsafe { libloading::Library::new(library.library()) }.unwrap();
    // SAFETY: the type is that of cufile.h.
    let register = unsafe { raw.get::<Register>(b"cuFileBufRegister") }.unwrap();
    let start = std::ptr::without_provenance(base as usize);
    // SAFETY: refused; the memory is alive.
    let status = unsafe { register(start, memory.bytes(), 0) };
    assert_eq!(
        (status.error, status.cuda),
        (5011, 201),
        "memory is registered on a thread where a context is current"
    );
    // SAFETY: the memory lives longer than the registration.
    let registered = unsafe { driver.register_buffer(context, base, memory.bytes()) }.unwrap();
    // SAFETY: refused.
    let again = unsafe { driver.register_buffer(context, base, memory.bytes()) };
    say("register memory again", again.map(|_| 0));
    let file = open(path);
    let handle = driver.register_file(file.as_fd()).unwrap();
    let again = driver.register_file(file.as_fd());
    say("register a file again", again.map(|_| 0));
    // SAFETY: the range lies in the registered memory, here and below.
    say("write", unsafe { handle.write(base, BYTES, 0, PAGE) });
    // SAFETY: as above.
    say("read", unsafe { handle.read(base, BYTES, 0, PAGE) });
    let end = (BYTES - PAGE) as u64;
    // SAFETY: as above.
    say("read at the end", unsafe {
        handle.read(base, BYTES, end, 0)
    });
    // SAFETY: as above.
    say("read behind", unsafe {
        handle.read(base, BYTES, 4 << 20, 0)
    });
    // SAFETY: as above; the system refuses the offset.
    let refused = unsafe { handle.write(base, BYTES, i64::MAX as u64 - 4095, 0) };
    say("write behind all files", refused);
    let read_only = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap();
    let other = driver.register_file(read_only.as_fd()).unwrap();
    // SAFETY: as above; the system refuses to write.
    let refused = unsafe { other.write(base, PAGE, 0, 0) };
    say("write what was opened to be read", refused);
    for (what, flag) in [
        ("opened through no link", libc::O_NOFOLLOW),
        ("opened without waiting", libc::O_NONBLOCK),
        ("opened to append", libc::O_APPEND),
    ] {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_DIRECT | flag);
        let file = options.open(path).unwrap();
        let refused = driver.register_file(file.as_fd());
        say(what, refused.map(|_| 0));
    }
    // A file that is closed before it is deregistered leaves its number behind.
    let number = read_only.as_raw_fd();
    drop(read_only);
    let next = open(&path.with_extension("next"));
    assert_eq!(next.as_raw_fd(), number, "not the next free number");
    let refused = driver.register_file(next.as_fd());
    say("register the number of a closed file", refused.map(|_| 0));
    drop(other);
    let taken = driver.register_file(next.as_fd());
    say("register it after that", taken.map(|_| 0));
    drop((handle, registered));
    // SAFETY: the memory lives longer than the registration.
    let anew = unsafe { driver.register_buffer(context, base, memory.bytes()) };
    say("register memory anew", anew.map(|_| 0));
    answers
}
