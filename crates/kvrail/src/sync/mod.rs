//! Where threads, locks and channels come from.
//!
//! From std and crossbeam-channel; the rest of the library names only this module. With the
//! feature `shuttle`, which is for tests, they are stand-ins that leave each step to a scheduler,
//! and the tests of `crate::models` run the store's code through thousands of interleavings.
//!
//! What the stand-ins do about time, which is not part of a model: a wait of at most
//! 100 ms may end at any moment, a longer one never ends by itself. So a
//! wake-up that gets lost is a deadlock, which the scheduler reports.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic, mpsc};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::thread;

#[cfg(not(feature = "shuttle"))]
pub(crate) use crossbeam_channel as channel;

#[cfg(feature = "shuttle")]
pub(crate) mod channel;
#[cfg(feature = "shuttle")]
mod lock;

#[cfg(feature = "shuttle")]
pub(crate) use lock::{Condvar, Mutex, MutexGuard};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{atomic, mpsc};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::thread;

// The same in a model: a count of references is no step that another thread could see.
pub(crate) use std::sync::{Arc, PoisonError, Weak};
