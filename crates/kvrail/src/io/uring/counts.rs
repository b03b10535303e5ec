//! What an engine of rings counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::io::IoCounts;

/// The counters of all rings of an engine.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Transfers that were asked to go on, because the system had moved a part only.
    pub(super) continued: AtomicU64,
    /// Transfers that a thread of the kernel had to do.
    pub(super) handed_over: AtomicU64,
    /// Requests in flight that the kernel was asked to end.
    pub(super) cancelled: AtomicU64,
    /// Requests whose memory was left to the kernel for good.
    pub(super) leaked: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self, held: u64) -> IoCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IoCounts {
            continued: get(&self.continued),
            handed_over: get(&self.handed_over),
            cancelled: get(&self.cancelled),
            leaked: get(&self.leaked),
            held,
            from_page_cache: 0,
        }
    }
}
