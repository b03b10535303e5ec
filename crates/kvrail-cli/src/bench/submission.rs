//! Chunks given to the store one at a time, as the thread of a serving engine does, and again when
//! the store had no room for one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvrail::{ChunkKey, ChunkRef, KvCache, LoadChunk, Store, StoreReport, StoreTicket};

use super::random::Random;
use crate::failure::Failure;

/// Longest wait for one chunk; far above any time worth reporting.
pub(crate) const WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How long a client waits before it submits a chunk again that the store had no room for.
const RETRY_PAUSE: Duration = Duration::from_millis(1);
/// Most times a chunk is submitted again: half a minute of pauses, when no store takes so long.
const RETRIES_MAX: u64 = 30_000;

/// How chunks are submitted to one store.
#[derive(Debug, Default)]
pub(crate) struct Submission {
    /// vLLM submits from one thread, so the gather of two chunks never overlaps.
    turn: Mutex<()>,
    retries: AtomicU64,
}

impl Submission {
    /// Returns how often a chunk was submitted again.
    pub(crate) fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    /// Stores one chunk that is not there yet: calls `submit`, which gives exactly one chunk to
    /// `store`, and waits.
    pub(crate) fn store(
        &self,
        store: &Store,
        item: u64,
        submit: impl Fn() -> Result<StoreTicket, Failure>,
    ) -> Result<(), Failure> {
        match self.submit(submit)?.stored {
            1 => Ok(()),
            _ => Err(Self::not_stored(store, item)),
        }
    }

    /// Calls `submit`, which gives exactly one chunk to a store, and waits; again as long as the
    /// store had no room for it. Returns what became of it the last time.
    pub(crate) fn submit(
        &self,
        submit: impl Fn() -> Result<StoreTicket, Failure>,
    ) -> Result<StoreReport, Failure> {
        let mut report = StoreReport::default();
        for _ in 0..=RETRIES_MAX {
            let ticket = {
                let turn = self.turn.lock();
                let _turn = turn.unwrap_or_else(|poisoned| poisoned.into_inner());
                submit()?
            };
            report = ticket.wait(WAIT_LIMIT)?;
            if report.dropped == 0 {
                break;
            }
            self.retries.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(RETRY_PAUSE);
        }
        Ok(report)
    }

    /// Returns why a chunk was not stored, as far as the store's notices tell.
    pub(crate) fn not_stored(store: &Store, item: u64) -> Failure {
        let notices = store.take_notices();
        let reasons: Vec<String> = notices.into_iter().map(|notice| notice.message).collect();
        Failure::new(format!(
            "chunk {item} was not stored: {}",
            reasons.join("; ")
        ))
        .with_hint("see whether --path has room and can be written to")
    }
}

/// Loads one chunk of a wave into `blocks` and waits.
pub(crate) fn load(
    cache: &KvCache,
    wave: &[u64],
    item: u64,
    blocks: Vec<usize>,
) -> Result<(), Failure> {
    let chunk = LoadChunk {
        chunk: chunk_ref(item, wave)?,
        first_block: 0,
        blocks,
    };
    let report = cache.load(vec![chunk])?.wait(WAIT_LIMIT)?;
    if report.loaded == 1 {
        return Ok(());
    }
    let reasons = report.errors.join("; ");
    Err(Failure::new(format!("chunk {item} was not loaded: {reasons}")).damaged())
}

/// Returns a chunk's slot: its place in its wave, whose items are consecutive numbers.
pub(crate) fn slot_of(wave: &[u64], item: u64) -> usize {
    let first = wave.first().copied().unwrap_or(item);
    (item - first) as usize
}

/// Returns a chunk's key; its parent is the chunk before it, as in a prompt that fills a wave.
pub(crate) fn chunk_ref(item: u64, wave: &[u64]) -> Result<ChunkRef, Failure> {
    let parent = if slot_of(wave, item) == 0 {
        None
    } else {
        Some(key_of(item - 1)?)
    };
    Ok(ChunkRef {
        key: key_of(item)?,
        parent,
    })
}

/// Returns a chunk key that is as evenly distributed as a hash.
pub(crate) fn key_of(item: u64) -> Result<ChunkKey, Failure> {
    let mut bytes = [0; 32];
    Random::new(item).fill(&mut bytes);
    Ok(ChunkKey::from_bytes(&bytes)?)
}
