//! The model checker: processes that share a store on a faulty file system, against a model.
//!
//! One process drives: it tells the others, one command each at a time, to store, load and look up,
//! removes chunks as a stranger does, kills and restarts them, and changes the faults of the mount.
//! It knows what every chunk must hold, and for each whether it is there, is not, or may be either.

pub mod driver;
pub mod model;
pub mod worker;

/// Chunks in play: few, so that the processes meet.
pub const CHUNKS: u64 = 200;

/// Limits of the stores under test, in seconds: short, as hangs last a second or two.
pub const WAIT_LIMIT_SECONDS: f64 = 1.0;
/// Longest lookup in seconds.
pub const LOOKUP_LIMIT_SECONDS: f64 = 0.5;
/// From when on an operation is slow, in seconds.
pub const SLOW_LIMIT_SECONDS: f64 = 0.4;
