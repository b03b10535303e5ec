//! NVIDIA's own libcufile on the mock of libcuda, in a process of its own.
//!
//! Without a GPU, without nvidia-fs: in its compatibility mode, in which it copies between device
//! memory and files itself, by the functions of the driver.

use std::ffi::c_long;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libloading::Library;

/// What the process may take. Opening the driver takes a tenth of a second.
const LIMIT: Duration = Duration::from_secs(120);

/// One version of the real library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealCufile {
    library: PathBuf,
}

impl RealCufile {
    /// Returns the libraries to test: those that `KVRAIL_CUFILE_LIBRARIES` names (with colons in
    /// between), else that of the wheels in the active virtual environment; or why there is none.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn find() -> Result<Vec<Self>, String> {
        if let Some(paths) = std::env::var_os("KVRAIL_CUFILE_LIBRARIES") {
            let paths = std::env::split_paths(&paths);
            return Ok(paths.map(|library| Self { library }).collect());
        }
        let environment = std::env::var_os("VIRTUAL_ENV");
        let environment =
            environment.ok_or("neither KVRAIL_CUFILE_LIBRARIES nor VIRTUAL_ENV is set")?;
        let entries = |folder: PathBuf| {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries.filter_map(|entry| Some(entry.ok()?.path()))
        };
        entries(Path::new(&environment).join("lib"))
            .flat_map(|python| entries(python.join("site-packages/nvidia")))
            .map(|wheel| wheel.join("lib/libcufile.so.0"))
            .find(|library| library.is_file())
            .map(|library| vec![Self { library }])
            .ok_or_else(|| {
                let environment = environment.display();
                format!("no libcufile.so.0 in the wheels of {environment}")
            })
    }

    /// Returns the library that [`RealCufile::run`] started this process for.
    pub fn of_this_process() -> Option<PathBuf> {
        std::env::var_os("KVRAIL_CUFILE_LIBRARY").map(Into::into)
    }

    /// Returns how often the driver is open in this process.
    ///
    /// # Panics
    /// When it is no cuFile.
    pub fn uses(library: &Path) -> i64 {
        // SAFETY: NVIDIA's library is made to be loaded so.
        let library = match unsafe { Library::new(library) } {
            Ok(library) => library,
            Err(error) => panic!("{}: {error}", library.display()),
        };
        let count = super::find::<unsafe extern "C" fn() -> c_long>(&library, b"cuFileUseCount");
        // SAFETY: the function takes nothing.
        let uses = unsafe { count() };
        std::mem::forget(library);
        uses
    }

    /// Returns the path of the library.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Runs an ignored test of the running test program in a process of its own, with what the
    /// library looks for on a machine: `/proc/modules`, without which it never returns, and a udev
    /// record of the device below `folder`, where the files will be. Says why where it cannot.
    ///
    /// # Panics
    /// When the test fails or does not end.
    pub fn run(&self, test: &str, folder: &Path) {
        let root = folder.join("machine");
        if let Err(reason) = make_machine(&root, folder) {
            eprintln!("skipped: {test} with {}: {reason}", self.library.display());
            return;
        }
        let program = match std::env::current_exe() {
            Ok(program) => program,
            Err(error) => panic!("the path of the running test: {error}"),
        };
        let child = Command::new(program)
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env("LD_PRELOAD", super::build().join("libmock_machine.so"))
            .env("KVRAIL_MOCK_ROOT", &root)
            .env("KVRAIL_CUFILE_LIBRARY", &self.library)
            // The library writes its log into the working directory.
            .current_dir(folder)
            .stdin(Stdio::null())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => panic!("start {test}: {error}"),
        };
        let end = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!("{test} did not end within {LIMIT:?}");
                }
            }
        };
        assert!(
            status.success(),
            "{test} with {}: {status}",
            self.library.display()
        );
    }
}

/// Writes what the library reads of a machine.
fn make_machine(root: &Path, folder: &Path) -> Result<(), String> {
    let told = |error: std::io::Error| error.to_string();
    let device = fs::metadata(folder).map_err(told)?.dev();
    // As glibc's major() and minor(), for numbers below 4096 and 256.
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff);
    if major == 0 {
        let folder = folder.display();
        return Err(format!(
            "{folder} lies on no block device, which cuFile wants"
        ));
    }
    let udev = root.join("run/udev/data");
    fs::create_dir_all(&udev).map_err(told)?;
    fs::create_dir_all(root.join("proc")).map_err(told)?;
    fs::write(root.join("proc/modules"), "nvme 1 2 - Live 0x0\n").map_err(told)?;
    let record = "E:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n";
    fs::write(udev.join(format!("b{major}:{minor}")), record).map_err(told)
}
