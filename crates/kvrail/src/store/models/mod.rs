//! Models: the store's own code, run through thousands of interleavings that shuttle chooses.
//!
//! Each test says what it models. Random choice finds what many interleavings show; the schedules
//! of probabilistic concurrency testing (PCT) find what needs a few switches at the right places. A
//! schedule that fails is printed, and `shuttle::replay` runs it again. Waits of more than 100 ms
//! never end by themselves here, so that a wake-up which gets lost is a deadlock (`crate::sync`).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a model that meets an error has failed"
)]

mod claims;
mod lookups;
mod pool;
mod queue;
mod tickets;
mod whole;

use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

use super::cache_shared::CacheShared;
use crate::chunk::PAGE_BYTES;
use crate::layout::{KvLayout, LayerSpan};
use crate::memory::{Region, StagingPool};
use crate::sync::Arc;

/// For waits that must not end by themselves.
const LONG: Duration = Duration::from_secs(3600);

/// Switches that matter in a PCT schedule.
const DEPTH: usize = 3;

/// Runs a model `iterations` times by each way of choosing.
fn explore(iterations: usize, model: impl Fn() + Send + Sync + Clone + 'static) {
    let mut config = Config::new();
    // Opening a store on a thread of a model needs more than shuttle's 32 KiB.
    config.stack_size = 1 << 19;
    config.max_steps = MaxSteps::FailAfter(5_000_000);
    config.silence_warnings = true;
    Runner::new(RandomScheduler::new(iterations), config.clone()).run(model.clone());
    Runner::new(PctScheduler::new(DEPTH, iterations), config).run(model);
}

/// A KV cache of four blocks in host memory, a chunk each, over `buffers` staging buffers.
fn kv_cache(buffers: usize) -> Arc<CacheShared> {
    let region = Region::zeroed(4 * PAGE_BYTES).unwrap();
    let layer = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: PAGE_BYTES,
        block_bytes: PAGE_BYTES,
    };
    let layout = KvLayout::new(vec![layer], 4, &[region.bytes()]).unwrap();
    // Head, payload and page table.
    let slot = 3 * PAGE_BYTES;
    let pool = StagingPool::new(buffers * slot, slot).unwrap();
    Arc::new(CacheShared::on_host(layout, vec![region], pool, 1).unwrap())
}
