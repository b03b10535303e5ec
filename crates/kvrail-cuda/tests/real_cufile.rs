//! NVIDIA's own libcufile, where one is at hand: `KVRAIL_CUFILE_LIBRARY` names it, else it is that
//! of the wheels in the active virtual environment. Needs no GPU.
//!
//! Versions from 1.16 on never return from opening the driver where `/proc/modules` does not exist,
//! and it cannot be closed again for a second try: so that happens in a process of its own, with a
//! limit. Transfers need a udev record of the device below the folder for temporary files.
#![expect(unsafe_code, reason = "hands memory of the test to cuFile")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvrail_cuda::{CuFile, CuFileDriver, Cuda, ErrorKind, LibraryPaths};

/// Opening the driver takes a tenth of a second.
const LIMIT: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
const BYTES: usize = 1 << 20;
/// `O_DIRECT` of Linux on x86-64 and on AArch64.
const O_DIRECT: i32 = if cfg!(target_arch = "aarch64") {
    0x10000
} else {
    0x4000
};

/// Returns the library to test, or why there is none.
fn find() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("KVRAIL_CUFILE_LIBRARY") {
        return Ok(path.into());
    }
    let environment = std::env::var_os("VIRTUAL_ENV");
    let environment = environment.ok_or("neither KVRAIL_CUFILE_LIBRARY nor VIRTUAL_ENV is set")?;
    let entries = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path()))
    };
    entries(Path::new(&environment).join("lib"))
        .flat_map(|python| entries(python.join("site-packages/nvidia")))
        .map(|wheel| wheel.join("lib/libcufile.so.0"))
        .find(|library| library.is_file())
        .ok_or_else(|| {
            format!(
                "no libcufile.so.0 in the wheels of {}",
                environment.display()
            )
        })
}

fn load() -> Option<CuFile> {
    match find() {
        Ok(path) => Some(CuFile::load(&[path]).unwrap()),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// Returns why the driver cannot be opened here.
fn spins(version: (u32, u32)) -> Option<String> {
    let spins = version >= (1, 16) && !Path::new("/proc/modules").exists();
    spins.then(|| {
        let (major, minor) = version;
        format!("there is no /proc/modules, where {major}.{minor} never returns from being opened")
    })
}

#[test]
fn the_real_library_has_every_function_and_knows_its_version() {
    let Some(library) = load() else { return };
    let version = library.version().unwrap();
    eprintln!(
        "libcufile {}.{}, vectored: {}, {}",
        version.0,
        version.1,
        library.has_vectored(),
        library.library().display()
    );
    assert_eq!(version.0, 1, "{version:?}");
    assert_eq!(
        library.has_vectored(),
        version >= (1, 20),
        "Readv and Writev came with 1.20"
    );
}

#[test]
fn the_real_driver_moves_bytes_or_says_why_not() {
    let Some(library) = load() else { return };
    if let Some(reason) = spins(library.version().unwrap()) {
        eprintln!("skipped: opening the driver: {reason}");
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("KVRAIL_CUFILE_LIBRARY", library.library())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() >= end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the driver did not answer within {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "the test above runs it in a process of its own"]
fn child() {
    let library = load().unwrap();
    let version = library.version().unwrap();
    // The library writes its log into the working directory.
    let folder = tempfile::tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    let driver = match library.open_driver() {
        Ok(driver) => driver,
        Err(error) => {
            eprintln!("skipped: transfers: {error}");
            assert_eq!(error.operation(), "cuFileDriverOpen");
            let cuda = Cuda::load(&LibraryPaths::default().cuda);
            let is_missing = cuda.is_err_and(|error| error.kind() == ErrorKind::LibraryMissing);
            match (version < (1, 16), is_missing) {
                (true, true) => assert_eq!(error.code(), Some(5033), "{error}"),
                _ => assert!((5001..5100).contains(&error.code().unwrap()), "{error}"),
            }
            return;
        }
    };
    eprintln!("the driver was opened");
    transfers(&driver, folder.path());
}

/// Host memory at a page boundary.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(bytes: usize) -> Self {
        let memory = vec![0_u8; bytes + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Self { memory, start }
    }

    fn address(&self) -> u64 {
        self.memory[self.start..].as_ptr() as u64
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(O_DIRECT)
        .open(path)
        .unwrap()
}

/// Writes, reads and compares on registered host memory, in the library's compatible mode.
fn transfers(driver: &CuFileDriver, folder: &Path) {
    let device = fs::metadata(folder).unwrap().dev();
    // As glibc's major() and minor(), for numbers below 4096 and 256.
    let record = format!("/run/udev/data/b{}:{}", device >> 8 & 0xfff, device & 0xff);
    let path = folder.join("file");
    let file = open(&path);
    let handle = match driver.register_file(file.as_fd()) {
        Ok(handle) => handle,
        Err(error) => {
            eprintln!("skipped: transfers: {error} ({record})");
            assert!(!Path::new(&record).exists(), "{record} is there: {error}");
            assert_eq!(error.code(), Some(5027), "{error}");
            return;
        }
    };
    let mut buffer = Buffer::new(2 * BYTES);
    let start = buffer.start;
    for (index, byte) in buffer.memory[start..start + BYTES].iter_mut().enumerate() {
        *byte = (index * 13 % 251) as u8;
    }
    let expected = buffer.memory[start..start + BYTES].to_vec();
    let base = buffer.address();
    // SAFETY: the buffer lives longer than the registration.
    let registered = unsafe { driver.register_buffer(base, 2 * BYTES) }.unwrap();
    // SAFETY: as above; refused.
    let again = unsafe { driver.register_buffer(base, 2 * BYTES) };
    assert_eq!(again.unwrap_err().code(), Some(5023));
    // SAFETY: the range lies in the registered memory.
    let written = unsafe { handle.write(base, BYTES, PAGE as u64, 0) };
    assert_eq!(written.unwrap(), BYTES);
    // SAFETY: as above.
    let read = unsafe { handle.read(base, BYTES, PAGE as u64, BYTES) };
    assert_eq!(read.unwrap(), BYTES);
    assert_eq!(
        &buffer.memory[start + BYTES..start + 2 * BYTES],
        expected,
        "what was written came back"
    );
    // SAFETY: as above; the file ends in between.
    let short = unsafe { handle.read(base, BYTES, BYTES as u64, BYTES) };
    assert_eq!(short.unwrap(), PAGE, "a read that meets the end is short");
    // SAFETY: as above; the file ends before.
    let behind = unsafe { handle.read(base, BYTES, 4 * BYTES as u64, BYTES) };
    assert_eq!(behind.unwrap(), 0);
    drop((handle, registered, file));
    let content = fs::read(&path).unwrap();
    assert_eq!(content.len(), PAGE + BYTES);
    assert_eq!(content[PAGE..], expected);
    vectored(driver, folder);
    eprintln!("bytes were written, read and compared");
}

/// One call that moves many pieces, where the library has it.
fn vectored(driver: &CuFileDriver, folder: &Path) {
    const PIECES: usize = 16;
    let file = open(&folder.join("vectored"));
    let handle = driver.register_file(file.as_fd()).unwrap();
    let mut buffer = Buffer::new(2 * BYTES);
    let start = buffer.start;
    for (index, byte) in buffer.memory[start..start + BYTES].iter_mut().enumerate() {
        *byte = (index / PAGE + index % 7) as u8;
    }
    let base = buffer.address();
    let each = BYTES / PIECES;
    // Backwards, so that the order of the pieces is seen.
    let pieces = |offset: usize| -> Vec<(u64, usize)> {
        let piece = |index| (base + (offset + index * each) as u64, each);
        (0..PIECES).rev().map(piece).collect()
    };
    // SAFETY: the buffer lives longer than the registration.
    let registered = unsafe { driver.register_buffer(base, 2 * BYTES) }.unwrap();
    // SAFETY: the pieces lie in the registered memory.
    let written = unsafe { handle.write_vectored(&pieces(0), 0) };
    match written {
        Ok(bytes) => assert_eq!(bytes, BYTES),
        Err(error) => {
            eprintln!("skipped: vectored transfers: {error}");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            return;
        }
    }
    // SAFETY: as above.
    let read = unsafe { handle.read_vectored(&pieces(BYTES), 0) };
    assert_eq!(read.unwrap(), BYTES);
    drop((handle, registered));
    let (first, second) = buffer.memory[start..start + 2 * BYTES].split_at(BYTES);
    assert!(first == second, "pieces came back to where they were from");
    let content = fs::read(folder.join("vectored")).unwrap();
    assert_eq!(content[..each], first[BYTES - each..]);
}
