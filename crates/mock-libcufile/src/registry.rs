//! What is registered.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Files by handle, buffers by address, and how often the driver is open.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) files: BTreeMap<usize, i32>,
    pub(crate) buffers: BTreeMap<u64, usize>,
    pub(crate) switches: BTreeMap<i32, bool>,
    pub(crate) open: i64,
    pub(crate) process: u32,
    pub(crate) next: usize,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    files: BTreeMap::new(),
    buffers: BTreeMap::new(),
    switches: BTreeMap::new(),
    open: 0,
    process: 0,
    next: 1,
});

pub(crate) fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}
