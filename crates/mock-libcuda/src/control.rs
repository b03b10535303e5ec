//! What tests call beside the driver's functions.

use std::ffi::{CStr, c_char};
use std::sync::Once;
use std::sync::atomic::Ordering;

use mock_script::{Action, Script};

use crate::memory::memory;
use crate::objects::{CAPTURING, OBJECTS};

static SCRIPT: Script = Script::new();
static FROM_ENVIRONMENT: Once = Once::new();

/// Counts a call and returns what shall happen to it.
pub(crate) fn enter(function: &str) -> Option<Action> {
    FROM_ENVIRONMENT.call_once(|| {
        if let Ok(text) = std::env::var("KVRAIL_MOCK_CUDA_SCRIPT") {
            let _ = SCRIPT.set(&text);
        }
    });
    SCRIPT.enter(function)
}

/// Replaces the script; 0 when it was understood.
///
/// # Safety
/// `text` ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvrail_mock_script(text: *const c_char) -> i32 {
    FROM_ENVIRONMENT.call_once(|| ());
    // SAFETY: the caller's text ends with a zero.
    let text = unsafe { CStr::from_ptr(text) };
    i32::from(SCRIPT.set(&text.to_string_lossy()).is_err())
}

/// Has another thread capture a graph, in the mode that is PyTorch's default, or end that.
#[unsafe(no_mangle)]
pub extern "C" fn kvrail_mock_capturing(on: bool) {
    CAPTURING.store(on, Ordering::SeqCst);
}

/// Returns how often a function was called.
///
/// # Safety
/// `name` ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvrail_mock_count(name: *const c_char) -> u64 {
    // SAFETY: the caller's text ends with a zero.
    let name = unsafe { CStr::from_ptr(name) };
    SCRIPT.calls(&name.to_string_lossy())
}

/// Returns how many objects, allocations and pinned ranges are alive.
#[unsafe(no_mangle)]
pub extern "C" fn kvrail_mock_balance() -> i64 {
    let memory = memory();
    let blocks = memory.count() + memory.pinned.len();
    OBJECTS.load(Ordering::SeqCst) + i64::try_from(blocks).unwrap_or(i64::MAX)
}

/// Returns an address at which the CPU may touch a range of device memory; null for a range that
/// leaves its allocation, and a host address unchanged.
#[unsafe(no_mangle)]
pub extern "C" fn kvrail_mock_translate(address: u64, bytes: u64) -> *mut u8 {
    let memory = memory();
    if memory.is_device(address) {
        let alias = memory.alias(address, bytes as usize);
        return alias.unwrap_or(std::ptr::null_mut());
    }
    std::ptr::with_exposed_provenance_mut(address as usize)
}
