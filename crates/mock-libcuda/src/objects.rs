//! Counts of what is alive, and the contexts of each thread.

use std::cell::RefCell;
use std::sync::atomic::{AtomicI64, Ordering};

/// Streams, events, modules and holds on contexts that are alive.
pub(crate) static OBJECTS: AtomicI64 = AtomicI64::new(0);

thread_local! {
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Device number of the current context of this thread.
pub(crate) fn current() -> Option<usize> {
    CURRENT.with_borrow(|stack| stack.last().copied())
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
