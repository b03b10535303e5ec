//! What tests call beside cuFile's functions.

use std::ffi::{CStr, c_char};
use std::sync::Once;

use mock_script::{Action, Script};

use crate::registry::registry;

static SCRIPT: Script = Script::new();
static FROM_ENVIRONMENT: Once = Once::new();

/// Counts a call and returns what shall happen to it.
pub(crate) fn enter(function: &str) -> Option<Action> {
    FROM_ENVIRONMENT.call_once(|| {
        if let Ok(text) = std::env::var("KVRAIL_MOCK_CUFILE_SCRIPT") {
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
pub unsafe extern "C" fn kvrail_mockfile_script(text: *const c_char) -> i32 {
    FROM_ENVIRONMENT.call_once(|| ());
    // SAFETY: the caller's text ends with a zero.
    let text = unsafe { CStr::from_ptr(text) };
    i32::from(SCRIPT.set(&text.to_string_lossy()).is_err())
}

/// Returns how often a function was called.
///
/// # Safety
/// `name` ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvrail_mockfile_count(name: *const c_char) -> u64 {
    // SAFETY: the caller's text ends with a zero.
    let name = unsafe { CStr::from_ptr(name) };
    SCRIPT.calls(&name.to_string_lossy())
}

/// Returns how many files and buffers are registered, and how often the driver is open.
#[unsafe(no_mangle)]
pub extern "C" fn kvrail_mockfile_balance() -> i64 {
    let registry = registry();
    let registered = registry.files.len() + registry.buffers.len();
    registry.open + i64::try_from(registered).unwrap_or(i64::MAX)
}
