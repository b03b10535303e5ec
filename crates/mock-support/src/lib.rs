//! Builds, finds and steers the mocks of libcuda and libcufile, for tests, and puts NVIDIA's own
//! libcufile on top of the mock of libcuda.
#![expect(unsafe_code, reason = "calls functions of the mocks by their C types")]
#![allow(
    clippy::panic,
    reason = "only tests use this; one without mocks has failed"
)]

use std::ffi::{CString, c_char};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

mod real;

pub use real::RealCufile;

/// The mock libraries, built and loaded.
#[derive(Debug)]
pub struct Mocks {
    cuda: (PathBuf, Library),
    cufile: (PathBuf, Library),
}

impl Mocks {
    /// Builds the mocks beside the running test and loads them.
    ///
    /// Each test process should call it once: the libraries' state is the process's.
    ///
    /// # Panics
    /// When they cannot be built or loaded.
    pub fn load() -> Self {
        let folder = build();
        let open = |name: &str| {
            let path = folder.join(name);
            // SAFETY: the mocks have no initialisers.
            match unsafe { Library::new(&path) } {
                Ok(library) => (path, library),
                Err(error) => panic!("{}: {error}", path.display()),
            }
        };
        let cuda = open("libmock_libcuda.so");
        // SAFETY: called before the test starts threads that read the environment.
        unsafe { std::env::set_var("KVRAIL_MOCK_LIBCUDA", &cuda.0) };
        Self {
            cufile: open("libmock_libcufile.so"),
            cuda,
        }
    }

    /// Returns where the mock of libcuda lies.
    pub fn cuda(&self) -> &Path {
        &self.cuda.0
    }

    /// Returns where the mock of libcufile lies.
    pub fn cufile(&self) -> &Path {
        &self.cufile.0
    }

    /// Sets the fault script of libcuda.
    ///
    /// # Panics
    /// For a script that is not understood.
    pub fn script_cuda(&self, text: &str) {
        set_script(&self.cuda.1, b"kvrail_mock_script", text);
    }

    /// Sets the fault script of libcufile.
    ///
    /// # Panics
    /// For a script that is not understood.
    pub fn script_cufile(&self, text: &str) {
        set_script(&self.cufile.1, b"kvrail_mockfile_script", text);
    }

    /// Has another thread capture a graph, or end that.
    pub fn capturing(&self, on: bool) {
        type Capturing = extern "C" fn(bool);
        find::<Capturing>(&self.cuda.1, b"kvrail_mock_capturing")(on);
    }

    /// Has work on streams done at the device's own pace, by chance, or as late as can be, which is
    /// so at first.
    pub fn own_pace(&self, on: bool) {
        find::<extern "C" fn(bool)>(&self.cuda.1, b"kvrail_mock_own_pace")(on);
    }

    /// Returns how often a function of libcuda was called.
    pub fn cuda_calls(&self, function: &str) -> u64 {
        calls(&self.cuda.1, b"kvrail_mock_count", function)
    }

    /// Returns how often a function of libcufile was called.
    pub fn cufile_calls(&self, function: &str) -> u64 {
        calls(&self.cufile.1, b"kvrail_mockfile_count", function)
    }

    /// Returns how much is alive: of libcuda, of libcufile.
    pub fn balance(&self) -> (i64, i64) {
        (
            balance(&self.cuda.1, b"kvrail_mock_balance"),
            balance(&self.cufile.1, b"kvrail_mockfile_balance"),
        )
    }

    /// Returns where the CPU may touch `bytes` bytes of device memory; null when they lie outside.
    pub fn translate(&self, address: u64, bytes: usize) -> *mut u8 {
        type Translate = unsafe extern "C" fn(u64, u64) -> *mut u8;
        let function = find::<Translate>(&self.cuda.1, b"kvrail_mock_translate");
        // SAFETY: the function takes any address.
        unsafe { function(address, bytes as u64) }
    }
}

/// Builds the mocks with the profile of the running test; returns their folder.
fn build() -> PathBuf {
    let Ok(test) = std::env::current_exe() else {
        panic!("the path of the running test is not known");
    };
    // target/<profile>/deps/<test>
    let Some(folder) = test.parent().and_then(Path::parent) else {
        panic!("{}: no folder of a profile", test.display());
    };
    let release = folder.ends_with("release");
    // Tests run in parallel processes; one of them builds.
    let lock = match File::create(folder.join("mocks.lock")) {
        Ok(lock) => lock,
        Err(error) => panic!("{}: {error}", folder.display()),
    };
    drop(lock.lock());
    let mut command = Command::new(env!("CARGO"));
    command
        .args([
            "build",
            "--quiet",
            "--locked",
            "-p",
            "mock-libcuda",
            "-p",
            "mock-libcufile",
            "-p",
            "mock-machine",
        ])
        .args(release.then_some("--release"))
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if let Some(target) = folder.parent() {
        command.env("CARGO_TARGET_DIR", target);
    }
    match command.output() {
        Ok(output) if output.status.success() => folder.to_path_buf(),
        Ok(output) => panic!(
            "building the mocks: {}",
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("building the mocks: {error}"),
    }
}

fn find<T: Copy>(library: &Library, name: &[u8]) -> T {
    // SAFETY: the callers give the types of the mocks' functions.
    match unsafe { library.get::<T>(name) } {
        Ok(symbol) => *symbol,
        Err(error) => panic!("{}: {error}", String::from_utf8_lossy(name)),
    }
}

fn text(text: &str) -> CString {
    match CString::new(text) {
        Ok(text) => text,
        Err(error) => panic!("{error}"),
    }
}

fn set_script(library: &Library, name: &[u8], script: &str) {
    let function = find::<unsafe extern "C" fn(*const c_char) -> i32>(library, name);
    let script = text(script);
    // SAFETY: the text ends with a zero.
    let code = unsafe { function(script.as_ptr()) };
    assert_eq!(code, 0, "not a fault script: {script:?}");
}

fn calls(library: &Library, name: &[u8], function: &str) -> u64 {
    let count = find::<unsafe extern "C" fn(*const c_char) -> u64>(library, name);
    let function = text(function);
    // SAFETY: the text ends with a zero.
    unsafe { count(function.as_ptr()) }
}

fn balance(library: &Library, name: &[u8]) -> i64 {
    let function = find::<unsafe extern "C" fn() -> i64>(library, name);
    // SAFETY: the function takes nothing.
    unsafe { function() }
}
