//! The way to the mock of libcuda: its memory, and the context that is current.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_NOW};

type Translate = unsafe extern "C" fn(u64, u64) -> *mut u8;
type Current = unsafe extern "C" fn(*mut *mut c_void) -> c_int;

struct Functions {
    translate: Translate,
    current: Current,
}

fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    let found = FUNCTIONS.get_or_init(|| {
        let path = std::env::var_os("KVRAIL_MOCK_LIBCUDA")?;
        // SAFETY: the same library that the process has loaded.
        let library = unsafe { Library::open(Some(path), RTLD_NOW) }.ok()?;
        // SAFETY: the types are those of the mock.
        let translate = *unsafe { library.get::<Translate>(b"kvrail_mock_translate") }.ok()?;
        // SAFETY: the type is that of cuda.h.
        let current = *unsafe { library.get::<Current>(b"cuCtxGetCurrent") }.ok()?;
        std::mem::forget(library);
        Some(Functions { translate, current })
    });
    found.as_ref()
}

/// Returns where the CPU may touch a range; null when it lies outside device memory.
pub(crate) fn translate(address: u64, bytes: usize) -> *mut u8 {
    match functions() {
        // SAFETY: the function takes any address.
        Some(functions) => unsafe { (functions.translate)(address, bytes as u64) },
        None => ptr::null_mut(),
    }
}

/// Returns whether a context is current on this thread.
pub(crate) fn has_context() -> bool {
    let mut context = ptr::null_mut();
    let Some(functions) = functions() else {
        return false;
    };
    // SAFETY: the pointer is to a live handle.
    let code = unsafe { (functions.current)(&raw mut context) };
    code == 0 && !context.is_null()
}
