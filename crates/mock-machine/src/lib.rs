//! To be preloaded (`LD_PRELOAD`): what a process opens below `/proc/modules` and `/run/udev` it
//! opens in the folder that `KVRAIL_MOCK_ROOT` names instead.
//!
//! NVIDIA's libcufile reads both by `fopen64`; test machines often have neither.
#![expect(unsafe_code, reason = "a C function in front of the C library's")]
#![allow(
    unreachable_pub,
    missing_docs,
    clippy::missing_safety_doc,
    reason = "the function and its contract are those of stdio.h"
)]

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::sync::OnceLock;

type Open = unsafe extern "C" fn(*const c_char, *const c_char) -> *mut libc::FILE;

/// Returns the C library's function.
fn next() -> Option<Open> {
    static NEXT: OnceLock<usize> = OnceLock::new();
    let address = *NEXT.get_or_init(|| {
        // SAFETY: the name ends with a zero.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"fopen64".as_ptr()) };
        found.expose_provenance()
    });
    let found = std::ptr::with_exposed_provenance_mut::<libc::c_void>(address);
    // SAFETY: null or the function, whose type this is.
    unsafe { std::mem::transmute::<*mut libc::c_void, Option<Open>>(found) }
}

/// Returns where the file lies instead, for files of the other machine.
fn elsewhere(path: &CStr) -> Option<CString> {
    let path = path.to_str().ok()?;
    let is_other = path == "/proc/modules" || path.starts_with("/run/udev/");
    let root = std::env::var_os("KVRAIL_MOCK_ROOT").filter(|_| is_other)?;
    let file = Path::new(&root).join(path.strip_prefix('/')?);
    CString::new(file.into_os_string().into_encoded_bytes()).ok()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
    let Some(open) = next() else {
        return std::ptr::null_mut();
    };
    // SAFETY: the caller's text ends with a zero.
    let other = (!path.is_null()).then(|| elsewhere(unsafe { CStr::from_ptr(path) }));
    let other = other.flatten();
    let path = other.as_deref().map_or(path, CStr::as_ptr);
    // SAFETY: as the caller vouches; the other path lives until the call returned.
    unsafe { open(path, mode) }
}
