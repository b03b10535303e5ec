//! The model checker: processes that share a store on a faulty file system, against a model.
//!
//! One process drives: it tells the others, one command each at a time, to store, load, look up,
//! verify and evict, removes chunks as a stranger does, kills and restarts them, the janitor among
//! them, and changes the faults of the mount. It knows what every chunk must hold, and for each
//! whether it is there, is not, or may be either; from outside it sees what lies on the disk.
//!
//! - `model`: what is known about each chunk
//! - `worker`, `process`: one of the processes, as it works and as the driver sees it
//! - `outside`, `trail`: the directory without the store's help, and its log of evictions
//! - `faults`: what the mount does wrong
//! - `shared_memory`: the DRAM tier that some of the processes share
//! - `driver`, `check`: the run, and what must hold in the end
//! - `report`: the plan of a run, and how it went

mod check;
mod driver;
mod faults;
mod model;
mod outside;
mod process;
mod report;
mod shared_memory;
mod trail;
pub mod worker;

pub use driver::run;
pub use report::{Plan, Report};

use std::time::Duration;

/// Chunks in play: few, so that the processes meet, and more than there is room for.
const CHUNKS: u64 = 400;
/// Bytes of a chunk's file: head, three pages of payload, one of table.
const FILE_BYTES: u64 = 20_480;
/// Most bytes in the directory: room for the hundred chunks that a quarantine may hold, and for so
/// few others that something is evicted all the time.
const MAX_SIZE: u64 = 260 * FILE_BYTES;
/// How long a chunk is kept without use, in seconds; a janitor's pass takes a quarter of it.
const TTL_SECONDS: f64 = 60.0;

/// Limits of the stores under test, in seconds: short, as hangs last a second or two.
const WAIT_LIMIT_SECONDS: f64 = 1.0;
/// Longest lookup in seconds.
const LOOKUP_LIMIT_SECONDS: f64 = 0.5;
/// From when on an operation is slow, in seconds.
const SLOW_LIMIT_SECONDS: f64 = 0.4;
/// Within this, a janitor that was killed has a successor: half a second is what docs/capacity.md
/// says, the rest is for machines that have other things to do.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(5);
