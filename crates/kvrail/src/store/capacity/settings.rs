//! What a janitor keeps to.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::room::WallClock;
use super::steps::StepHook;
use crate::config::{EvictionPolicy, MinFree, StoreConfig};
use crate::io::Observer;

/// When a janitor does what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JanitorTiming {
    /// Time between two looks at lease and account, and between two signs of life.
    pub tick: Duration,
    /// How long a lease holds without a sign of life.
    pub lease_limit: Duration,
    /// How long a pass over everything takes at least, while nothing must be evicted.
    pub pass: Duration,
}

impl Default for JanitorTiming {
    fn default() -> Self {
        Self {
            tick: Duration::from_millis(500),
            // Twenty signs of life: a mount that answers slowly must not cost the lease.
            lease_limit: Duration::from_secs(10),
            // 10 million chunks are 1,400 `stat` calls a second then.
            pass: Duration::from_secs(2 * 3600),
        }
    }
}

/// What a janitor keeps to, and what tests change about it.
#[derive(Debug, Clone)]
pub struct JanitorSettings {
    /// Most bytes in the directory.
    pub max_size: Option<u64>,
    /// Free space to leave on the file system.
    pub min_free: MinFree,
    /// Where eviction ends, as a share of the limit.
    pub low_watermark: f64,
    /// How long a chunk is kept without use.
    pub ttl: Option<Duration>,
    /// Which chunks go first.
    pub policy: EvictionPolicy,
    /// When it does what.
    pub timing: JanitorTiming,
    /// What tells the time of day.
    pub clock: WallClock,
    /// Called at each step.
    pub hook: Option<Arc<StepHook>>,
    /// Told of each change of what is on disk.
    pub observer: Option<Observer>,
}

impl JanitorSettings {
    /// Makes the settings of a store's janitor.
    pub fn new(config: &StoreConfig) -> Self {
        let ttl = config
            .ttl_seconds
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let mut timing = JanitorTiming::default();
        if let Some(ttl) = ttl {
            // Chunks outlive their time by a quarter at most.
            timing.pass = timing.pass.min(ttl / 4);
        }
        Self {
            max_size: config.max_size,
            min_free: config.min_free,
            low_watermark: config.low_watermark,
            ttl,
            policy: config.eviction_policy,
            timing,
            clock: SystemTime::now,
            hook: None,
            observer: None,
        }
    }
}
