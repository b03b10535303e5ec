//! NVIDIA's own libcufile, where one is at hand: `KVRAIL_CUFILE_LIBRARY` names it. Needs no GPU.
//!
//! What can be seen without one: that the library is found and has every function, and that its
//! answers are read as what they are. Versions from 1.16 on never return from opening the driver
//! where `/proc/modules` does not exist, so those are not asked to there.
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::path::{Path, PathBuf};

use kvrail_cuda::CuFile;

#[test]
fn the_real_library_is_loaded_and_its_answers_are_understood() {
    let Some(path) = std::env::var_os("KVRAIL_CUFILE_LIBRARY") else {
        eprintln!("skipped: KVRAIL_CUFILE_LIBRARY names no libcufile.so.0");
        return;
    };
    // The library writes its log into the working directory.
    let folder = tempfile::tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    let library = CuFile::load(&[PathBuf::from(path)]).unwrap();
    let version = library.version().unwrap();
    eprintln!(
        "libcufile {}.{}, vectored: {}",
        version.0,
        version.1,
        library.has_vectored()
    );
    assert_eq!(
        library.has_vectored(),
        version >= (1, 20),
        "Readv and Writev came with 1.20"
    );
    if version >= (1, 16) && !Path::new("/proc/modules").exists() {
        eprintln!("skipped: opening the driver, there is no /proc/modules");
        return;
    }
    match library.open_driver() {
        Ok(_) => eprintln!("the driver was opened"),
        Err(error) => {
            eprintln!("{error}");
            assert_eq!(error.operation(), "cuFileDriverOpen");
            assert!((5001..5100).contains(&error.code().unwrap()), "{error}");
        }
    }
}
