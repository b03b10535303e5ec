//! The free space of a file system, and whether removing chunks adds to it.
//!
//! With snapshots, or on a volume that others fill as fast, it does not: eviction would go on until
//! nothing is left, in vain.

use std::path::Path;
use std::time::{Duration, Instant};

use super::account::signed;
use crate::config::MinFree;
use crate::error::{Error, Result};

/// How long eviction for free space rests after it has freed nothing.
const USELESS_FOR: Duration = Duration::from_secs(600);
/// Bytes after whose removal there must be more free space, or removing is useless.
const USELESS_BYTES: u64 = 1 << 30;

/// Whether removing chunks gives the file system space back.
#[derive(Debug, Default)]
pub(super) struct Relief {
    /// Free space when it was looked at first, and the bytes evicted and stored until then.
    compared: Option<(u64, u64, i64)>,
    useless_until: Option<Instant>,
}

impl Relief {
    /// Begins to compare, unless that is under way.
    pub(super) fn watch(&mut self, available: u64, evicted: u64, flow: i64) {
        self.compared.get_or_insert((available, evicted, flow));
    }

    /// Stops comparing.
    pub(super) fn unwatch(&mut self) {
        self.compared = None;
    }

    /// Returns whether it was seen to be missing, lately.
    pub(super) fn is_missing(&self) -> bool {
        self.useless_until
            .is_some_and(|until| Instant::now() < until)
    }

    /// Returns whether evicting gives the file system space back, as far as that was seen.
    ///
    /// `evicted` bytes are those of the janitor, `flow` those that others stored less removed.
    pub(super) fn is_seen(&mut self, available: u64, evicted: u64, flow: i64) -> bool {
        if let Some((before, evicted_before, flow_before)) = self.compared {
            let removed = evicted.saturating_sub(evicted_before);
            if removed >= USELESS_BYTES {
                let gained = signed(available) - signed(before) + (flow - flow_before);
                if gained < signed(removed / 4) {
                    self.useless_until = Some(Instant::now() + USELESS_FOR);
                }
                self.compared = None;
            }
        }
        !self.is_missing()
    }
}

/// Returns the free bytes of the file system at `root`, and those that are to stay free.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system does not tell.
pub(super) fn free_space(root: &Path, min_free: MinFree) -> Result<(u64, u64)> {
    let found =
        rustix::fs::statvfs(root).map_err(|errno| Error::io("statvfs", root, errno.into()))?;
    let total = found.f_blocks.saturating_mul(found.f_frsize);
    let reserve = match min_free {
        MinFree::Bytes(bytes) => bytes,
        MinFree::Share(share) => (total as f64 * share) as u64,
    };
    Ok((found.f_bavail.saturating_mul(found.f_frsize), reserve))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn eviction_that_frees_nothing_is_found_out() {
        let mut relief = Relief::default();
        relief.watch(10 * GIB, 0, 0);
        // Half of it came back, while others stored as much again.
        assert!(relief.is_seen(10 * GIB + GIB / 2, GIB, 0));
        relief.watch(10 * GIB, GIB, 0);
        assert!(relief.is_seen(9 * GIB, 2 * GIB, 2 * GIB as i64));
        relief.watch(10 * GIB, 0, 0);
        assert!(relief.is_seen(10 * GIB, GIB - 1, 0), "too little to tell");
        assert!(!relief.is_seen(10 * GIB, GIB, 0));
        assert!(relief.is_missing());
    }
}
