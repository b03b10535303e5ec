//! libcuda and libcufile: where they are, and what they say of themselves.
//!
//! Loading runs their initialisers, and `cuInit` talks to the driver; cuFile's driver is never
//! opened in this process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvrail::io::within;
use kvrail_cuda::{CuFile, Cuda, LibraryPaths};
use serde::Serialize;

/// The CUDA driver's library.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CudaLibrary {
    #[serde(serialize_with = "super::lossy")]
    path: PathBuf,
    /// The version of CUDA that the driver supports, as `13.0`.
    pub(super) cuda_version: String,
    pub(super) devices: Vec<CudaDevice>,
}

/// A GPU as CUDA numbers it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CudaDevice {
    pub(super) ordinal: usize,
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) pci_address: String,
    pub(super) compute_capability: String,
}

/// The library of cuFile.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CufileLibrary {
    #[serde(serialize_with = "super::lossy")]
    pub(super) path: PathBuf,
    /// As `1.15`.
    pub(super) version: Option<String>,
    /// Whether one call can move many pieces of memory.
    pub(super) vectored: bool,
}

/// Loads libcuda and asks for its devices; the error is one line.
pub(super) fn find_cuda(limit: Duration) -> Result<CudaLibrary, String> {
    within(limit, "libcuda", || {
        let cuda = Cuda::load(&LibraryPaths::default().cuda)?;
        let devices = (0..cuda.device_count())
            .map(|ordinal| {
                let device = cuda.device(ordinal)?;
                let (major, minor) = device.compute_capability;
                Ok(CudaDevice {
                    ordinal,
                    name: device.name,
                    memory_bytes: device.total_bytes as u64,
                    pci_address: device.pci_bus_id.to_ascii_lowercase(),
                    compute_capability: format!("{major}.{minor}"),
                })
            })
            .collect::<kvrail_cuda::Result<_>>()?;
        let (major, minor) = cuda.driver_version();
        Ok(CudaLibrary {
            path: loaded_from(cuda.library()),
            cuda_version: format!("{major}.{minor}"),
            devices,
        })
    })
    .map_err(|error| error.to_string())?
    .map_err(|error: kvrail_cuda::Error| one_line(&error))
}

/// Loads libcufile: the one that the user chose, else the first that is found.
pub(super) fn find_cufile(chosen: Option<&Path>, limit: Duration) -> Result<CufileLibrary, String> {
    let candidates = cufile_candidates(chosen);
    within(limit, "libcufile", move || {
        let cufile = CuFile::load(&candidates)?;
        Ok(CufileLibrary {
            path: loaded_from(cufile.library()),
            version: cufile
                .version()
                .map(|(major, minor)| format!("{major}.{minor}")),
            vectored: cufile.has_vectored(),
        })
    })
    .map_err(|error| error.to_string())?
    .map_err(|error: kvrail_cuda::Error| one_line(&error))
}

/// Returns where libcufile is looked for: the library that the user chose, else the first of many.
pub(crate) fn cufile_candidates(chosen: Option<&Path>) -> Vec<PathBuf> {
    // An empty variable is one that is not set.
    match chosen.filter(|path| !path.as_os_str().is_empty()) {
        Some(path) => vec![path.to_path_buf()],
        None => candidates(),
    }
}

/// Returns where libcufile is looked for: the system's places, then the wheels of the environment.
fn candidates() -> Vec<PathBuf> {
    let mut candidates = LibraryPaths::default().cufile;
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .chain(own_environment());
    for environment in environments {
        for library in wheel_libraries(&environment) {
            if !candidates.contains(&library) {
                candidates.push(library);
            }
        }
    }
    candidates
}

/// Returns the environment that this program lies in, where it lies in one.
fn own_environment() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let environment = program.parent()?.parent()?;
    environment
        .join("pyvenv.cfg")
        .is_file()
        .then(|| environment.to_path_buf())
}

/// Finds libcufile in the wheels of a Python environment, in order of their names.
///
/// `nvidia-cufile-cu12` puts it into `nvidia/cufile/lib`, `nvidia-cufile` (CUDA 13) into
/// `nvidia/cu13/lib`.
fn wheel_libraries(environment: &Path) -> Vec<PathBuf> {
    let pythons = entries(&environment.join("lib"))
        .into_iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("python3"))
        });
    pythons
        .flat_map(|python| entries(&python.join("site-packages/nvidia")))
        .map(|wheel| wheel.join("lib/libcufile.so.0"))
        .filter(|library| library.is_file())
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    paths
}

/// Returns the file that the system's search made of a library's name.
fn loaded_from(library: &Path) -> PathBuf {
    let wanted = library.file_name().unwrap_or_default().to_string_lossy();
    let stem = wanted.split(".so").next().unwrap_or_default();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let found = maps.lines().find_map(|line| {
        let path = Path::new(line.get(line.find('/')?..)?);
        let name = path.file_name()?.to_string_lossy();
        let rest = name.strip_prefix(stem)?;
        rest.starts_with(".so").then(|| path.to_path_buf())
    });
    found.unwrap_or_else(|| library.to_path_buf())
}

fn one_line(error: &kvrail_cuda::Error) -> String {
    error.to_string().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_are_found_by_their_folders() {
        let environment = tempfile::tempdir().unwrap();
        let site = environment.path().join("lib/python3.11/site-packages");
        for wheel in ["cufile", "cu13", "cudnn"] {
            std::fs::create_dir_all(site.join("nvidia").join(wheel).join("lib")).unwrap();
        }
        assert!(wheel_libraries(environment.path()).is_empty());
        let expected: Vec<PathBuf> = ["cu13", "cufile"]
            .map(|wheel| site.join("nvidia").join(wheel).join("lib/libcufile.so.0"))
            .into();
        for library in &expected {
            std::fs::write(library, "").unwrap();
        }
        assert_eq!(wheel_libraries(environment.path()), expected);
        assert!(wheel_libraries(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn a_library_that_is_missing_or_none_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("libcufile.so.0");
        std::fs::write(&text, "no library\n").unwrap();
        for path in [text, folder.path().join("missing.so"), "libc.so.6".into()] {
            let error = find_cufile(Some(&path), Duration::from_secs(60)).unwrap_err();
            assert!(!error.contains('\n'), "{error}");
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_loaded_library_is_named_by_its_file() {
        let path = loaded_from(Path::new("libc.so.6"));
        assert!(path.is_absolute(), "{}", path.display());
        assert_eq!(
            loaded_from(Path::new("libnone.so")),
            Path::new("libnone.so")
        );
    }
}
