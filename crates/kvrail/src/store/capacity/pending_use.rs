//! The use of a chunk that its file is still to be told, when nobody waits for the job any more.

use std::time::{Duration, Instant};

use super::touch::Use;
use crate::chunk::{ChunkRef, Part};
use crate::store::present::Place;
use crate::store::shared::StoreShared;
use crate::store::watch::Watched;

/// How long the chunks before one are told of its use at once, at most. The rest, of a long prompt on a
/// slow file system, is told later.
const TELL_LIMIT: Duration = Duration::from_secs(1);

/// A use of a chunk by a load, or by a store that found it there.
#[derive(Debug)]
pub(in crate::store) struct PendingUse {
    /// What was asked for.
    pub(in crate::store) place: Place,
    pub(in crate::store) chunk: ChunkRef,
    /// Whose files it was loaded from.
    pub(in crate::store) parts: Vec<Part>,
    /// When, in milliseconds since 1970 by the clock of the path.
    pub(in crate::store) at: i64,
}

impl PendingUse {
    /// Renews the stamps of the chunk and of those before it, as the job that `watched` knows, unless a
    /// load waits. Returns whether some are left.
    pub(in crate::store) fn tell(
        &self,
        store: &StoreShared,
        watched: &Watched,
        load_waits: impl Fn() -> bool,
    ) -> bool {
        // No path is to be taken for one that hangs for that.
        let until = Instant::now() + TELL_LIMIT.min(store.wait_limit / 4);
        let goes_on = || Instant::now() < until && !load_waits();
        let mut is_left = false;
        for part in &self.parts {
            let used = Use {
                store,
                group: self.place.0,
                part: *part,
                chunk: &self.chunk,
                watched,
                at: self.at,
            };
            is_left |= used.tell(goes_on);
        }
        is_left
    }
}
