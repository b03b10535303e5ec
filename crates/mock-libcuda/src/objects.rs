//! Counts of what is alive, and the contexts of each thread.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Streams, events, modules and holds on contexts that are alive.
pub(crate) static OBJECTS: AtomicI64 = AtomicI64::new(0);

/// Whether a thread that is not ours captures a graph in the global mode.
pub(crate) static CAPTURING: AtomicBool = AtomicBool::new(false);

thread_local! {
    static CAPTURE_MODE: Cell<u32> = const { Cell::new(0) };
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Sets this thread's mode of capture and returns the one before.
pub(crate) fn exchange_capture_mode(mode: u32) -> u32 {
    CAPTURE_MODE.replace(mode)
}

/// Returns whether the driver refuses calls of this thread that would disturb a capture.
pub(crate) fn is_refused() -> bool {
    CAPTURING.load(Ordering::SeqCst) && CAPTURE_MODE.get() == 0
}

/// Device number of the current context of this thread.
pub(crate) fn current() -> Option<usize> {
    // A library may give back what it holds when the process ends, after this thread's values.
    let top = CURRENT.try_with(|stack| stack.borrow().last().copied());
    top.ok().flatten()
}

pub(crate) fn push(device: usize) {
    CURRENT.with_borrow_mut(|stack| stack.push(device));
}

pub(crate) fn pop() -> Option<usize> {
    CURRENT.with_borrow_mut(Vec::pop)
}

pub(crate) fn count(change: i64) {
    OBJECTS.fetch_add(change, Ordering::SeqCst);
}

pub(crate) fn device_count() -> usize {
    let text = std::env::var("KVRAIL_MOCK_DEVICES").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(2)
}
