//! What is registered, and the way to the memory of the libcuda mock.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::os::unix::{Library, RTLD_NOW};

/// Files by handle, buffers by address, and how often the driver is open.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) files: BTreeMap<usize, i32>,
    pub(crate) buffers: BTreeMap<u64, usize>,
    pub(crate) open: i64,
    pub(crate) process: u32,
    pub(crate) next: usize,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    files: BTreeMap::new(),
    buffers: BTreeMap::new(),
    open: 0,
    process: 0,
    next: 1,
});

pub(crate) fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

type Translate = unsafe extern "C" fn(u64, u64) -> *mut u8;

/// Returns where the CPU may touch a range; null when it lies outside device memory.
pub(crate) fn translate(address: u64, bytes: usize) -> *mut u8 {
    static FUNCTION: OnceLock<Option<Translate>> = OnceLock::new();
    let function = FUNCTION.get_or_init(|| {
        let path = std::env::var_os("KVRAIL_MOCK_LIBCUDA")?;
        // SAFETY: the same library that the process has loaded.
        let library = unsafe { Library::open(Some(path), RTLD_NOW) }.ok()?;
        // SAFETY: the type is that of the mock.
        let function = *unsafe { library.get::<Translate>(b"kvrail_mock_translate") }.ok()?;
        std::mem::forget(library);
        Some(function)
    });
    match function {
        // SAFETY: the function takes any address.
        Some(function) => unsafe { function(address, bytes as u64) },
        None => std::ptr::null_mut(),
    }
}
