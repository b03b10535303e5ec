//! At which pace work on streams is done.
//!
//! Late, the default: nothing runs before somebody waits for it, so that code which looks at
//! memory too early sees what was there before. Its own: as on a GPU, work is done meanwhile, and a query
//! only says whether it is. Here a thread does one piece after the other, each of a stream
//! that it picks by chance, after pauses that vary: what code left in no order comes in any.

use std::ffi::c_void;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Once};
use std::thread;
use std::time::Duration;

use crate::streams::streams;

/// The longest pause between two pieces of work.
const PAUSE_MICROSECONDS: u64 = 200;

static IS_OWN: LazyLock<AtomicBool> = LazyLock::new(|| {
    let wanted = std::env::var("KVRAIL_MOCK_PACE");
    AtomicBool::new(wanted.is_ok_and(|pace| pace == "own"))
});
static STARTED: Once = Once::new();

/// Returns whether work is done without anybody waiting for it.
pub(crate) fn is_own() -> bool {
    IS_OWN.load(Ordering::Relaxed)
}

/// Has work done at the device's own pace from now on, or late.
#[unsafe(no_mangle)]
pub extern "C" fn kvrail_mock_own_pace(on: bool) {
    IS_OWN.store(on, Ordering::Relaxed);
}

/// Starts the thread that does the work, where there is one.
pub(crate) fn start() {
    if is_own() {
        STARTED.call_once(|| {
            stay_loaded();
            thread::spawn(work);
        });
    }
}

fn work() {
    let chance = RandomState::new();
    for number in 0_u64.. {
        let drawn = chance.hash_one(number);
        if is_own() {
            streams().advance(drawn);
        }
        thread::sleep(Duration::from_micros((drawn >> 32) % PAUSE_MICROSECONDS));
    }
}

/// Keeps this library's code where it is when whoever loaded it unloads it: the thread runs in it.
fn stay_loaded() {
    let mut found = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: an address in this library, and room for the answer.
    let is_known = unsafe { libc::dladdr(stay_loaded as *const c_void, &raw mut found) } != 0;
    assert!(is_known, "a library of its own");
    // SAFETY: the name is one that the loader keeps; the library is loaded already.
    let handle = unsafe { libc::dlopen(found.dli_fname, libc::RTLD_NOW | libc::RTLD_NODELETE) };
    assert!(!handle.is_null(), "loaded already");
}
