//! Faults on purpose, for tests: what disks, networks and other hosts do to a store.
//!
//! - [`FaultEngine`] wraps an I/O engine and fails, delays, holds or damages its requests
//! - `fault-fs`, a program of this crate, is a FUSE file system over a folder that does the same to
//!   every operation of a file system; [`FaultMount`] runs and steers it
//! - [`soak`] is the model checker over both
//! - [`Rules`] is the script of both: which operations on which paths, what happens, how often
//! - `count-instructions`, another program, guards what the inner loops of a chunk cost
//! - [`Random`] is where every choice comes from: the same seed, the same faults
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "only tests use this; one that meets an error has failed"
)]

mod damage;
mod engine;
pub mod file_system;
mod mount;
mod random;
mod rules;
pub mod soak;

pub use damage::Damage;
pub use engine::FaultEngine;
pub use mount::FaultMount;
pub use random::{Random, fresh_seed};
pub use rules::{Effect, Fault, Rules, matches_pattern};
