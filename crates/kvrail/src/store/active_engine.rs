//! The engine that moves a path's bytes, which another one may replace while the store is in use.

use super::engine::Chosen;
use crate::config::PageCache;
use crate::io::{CachedReads, Folder, IoEngine, IoFile};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What moves bytes between the files of a path and staging memory of the host.
///
/// Whoever begins something takes the engine of that moment and keeps it to the end, so it does not
/// matter to what is under way when it is replaced.
#[derive(Debug)]
pub(super) struct ActiveEngine {
    active: Mutex<Active>,
}

#[derive(Debug)]
struct Active {
    engine: Arc<dyn IoEngine>,
    /// The same with the page cache in front; `None` where that is not asked.
    cached_reads: Option<Arc<CachedReads>>,
    reason: String,
}

impl ActiveEngine {
    pub(super) fn new((engine, reason): Chosen) -> Self {
        let active = Active {
            engine,
            cached_reads: None,
            reason,
        };
        Self {
            active: Mutex::new(active),
        }
    }

    /// Puts the page cache in front of reads, where files are opened direct and it is wished for.
    pub(super) fn with_page_cache(self, wish: PageCache, direct: bool) -> Self {
        {
            let mut active = self.lock();
            active.cached_reads = (direct && wish != PageCache::Bypass)
                .then(|| Arc::new(CachedReads::new(Arc::clone(&active.engine))));
        }
        self
    }

    fn lock(&self) -> MutexGuard<'_, Active> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the engine for what begins now.
    pub(super) fn get(&self) -> Arc<dyn IoEngine> {
        Arc::clone(&self.lock().engine)
    }

    /// Returns what reads for what begins now.
    pub(super) fn reader(&self) -> Arc<dyn IoEngine> {
        let active = self.lock();
        match &active.cached_reads {
            Some(reads) => Arc::clone(reads) as Arc<dyn IoEngine>,
            None => Arc::clone(&active.engine),
        }
    }

    /// Gives a file that was opened direct a view through the page cache, where that is in front.
    pub(super) fn look_at(&self, file: IoFile, folder: &Folder, below: &str) -> IoFile {
        let reads = self.lock().cached_reads.clone();
        match reads {
            Some(reads) => reads.look_at(file, folder, below),
            None => file,
        }
    }

    /// Returns the bytes that reads took from the page cache, with whichever engine.
    pub(super) fn page_cache_bytes(&self) -> u64 {
        let reads = self.lock().cached_reads.clone();
        reads.map_or(0, |reads| reads.bytes())
    }

    /// Returns the engine's name and why it is that one.
    pub(super) fn describe(&self) -> (&'static str, String) {
        let active = self.lock();
        (active.engine.name(), active.reason.clone())
    }

    /// Sets what moves the bytes of whatever begins from now on. Returns whether it is another
    /// engine than before.
    pub(super) fn replace(&self, (engine, reason): Chosen) -> bool {
        let mut active = self.lock();
        active.reason = reason;
        if Arc::ptr_eq(&active.engine, &engine) {
            return false;
        }
        let reads = active.cached_reads.as_ref();
        active.cached_reads = reads.map(|reads| Arc::new(reads.with_engine(Arc::clone(&engine))));
        let before = std::mem::replace(&mut active.engine, engine);
        // Without the lock: the last one who has an engine ends its threads.
        drop(active);
        drop(before);
        true
    }
}
