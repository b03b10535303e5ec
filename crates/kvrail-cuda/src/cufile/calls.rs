//! Calls of libcufile, none of which may run while the process ends.
//!
//! At its exit a process takes apart what its libraries keep, on the thread that exits. A store's
//! threads may close the driver at just that moment, as may whoever still has one: libcufile (1.20
//! seen) then calls what is no more, and the process dies of a signal. So calls are counted,
//! and before the library's own end, none begins any more and those under way are waited for.
#![expect(unsafe_code, reason = "registers a function to be called at exit")]

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the exit waits for calls: far more than a transfer takes, far less than one that hangs.
const EXIT_LIMIT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(1);

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
static IS_EXITING: AtomicBool = AtomicBool::new(false);
/// The process that asked for the wait: one that was forked from it has not its threads.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static MOVED: Once = Once::new();

/// A call under way.
#[derive(Debug)]
pub(super) struct Call(());

impl Call {
    /// Begins a call; `None` when the process is about to end.
    pub(super) fn begin() -> Option<Self> {
        // Counted first, so that the exit sees this call, or this call the exit.
        UNDER_WAY.fetch_add(1, Ordering::SeqCst);
        let call = Self(());
        (!IS_EXITING.load(Ordering::SeqCst)).then_some(call)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Has the exit wait for calls, before it takes apart what the library has made so far: functions
/// for the exit are called in the reverse order of their registration.
pub(super) fn wait_at_exit() {
    PROCESS.store(std::process::id(), Ordering::SeqCst);
    // SAFETY: the function may be called at any time. Where there is no room for it, nothing is
    // waited for, as before.
    unsafe { libc::atexit(at_exit) };
}

/// Does that once more after the first transfer, for which the library makes more.
pub(super) fn moved() {
    MOVED.call_once(wait_at_exit);
}

extern "C" fn at_exit() {
    if PROCESS.load(Ordering::SeqCst) != std::process::id() {
        return;
    }
    IS_EXITING.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while UNDER_WAY.load(Ordering::SeqCst) > 0 && start.elapsed() < EXIT_LIMIT {
        thread::sleep(POLL);
    }
}
