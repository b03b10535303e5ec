//! When a chunk was last used and how often, kept in its file's modification time.
//!
//! The time holds both, so that every process and host sees them and no index is needed: whole
//! milliseconds are the time of use, and the microseconds below say how often the chunk was used
//! again: `1000 * (uses + 1)` nanoseconds. Any other rest is a file that another program touched,
//! or a file system with coarser times: no use again is known of then.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};

use crate::io::FileStatus;

/// Uses that are counted; more say nothing more.
pub const USES_MAX: u8 = 15;

/// How old a stamp must be to be renewed, in milliseconds.
pub(super) const RENEWED_AFTER_MILLISECONDS: i64 = 60_000;
/// By how much a chunk's stamp is older than that of the chunk before it, in milliseconds: above
/// the resolution of every common file system but those with whole seconds.
const BEFORE: i64 = 10;

/// The last use of a chunk. Ordered by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp {
    milliseconds: i64,
    uses: u8,
}

impl Stamp {
    /// Makes a stamp: milliseconds since 1970, and how often the chunk was used again, at most
    /// [`USES_MAX`].
    pub fn new(milliseconds: i64, uses: u8) -> Self {
        Self {
            milliseconds,
            uses: uses.min(USES_MAX),
        }
    }

    /// Returns the stamp of a chunk that is stored now, `parent` being the time of the stamp of the
    /// chunk before it in its prompt, where there is one: that of now, or just before the parent's.
    pub fn first(now_milliseconds: i64, parent_milliseconds: Option<i64>) -> Self {
        Self::new(time_of_use(now_milliseconds, parent_milliseconds), 0)
    }

    /// Returns the stamp of a chunk that is used again now; `None` when it was used a moment ago.
    pub fn renewed(self, now_milliseconds: i64, parent_milliseconds: Option<i64>) -> Option<Self> {
        let time = time_of_use(now_milliseconds, parent_milliseconds);
        let is_old = time.saturating_sub(self.milliseconds) >= RENEWED_AFTER_MILLISECONDS;
        is_old.then(|| Self::new(time, self.uses.saturating_add(1)))
    }

    /// Reads a file's modification time.
    pub fn from_time(seconds: i64, nanoseconds: i64) -> Self {
        let rest = nanoseconds.rem_euclid(1_000_000);
        let uses = match rest / 1000 {
            count @ 1..=16 if rest % 1000 == 0 => u8::try_from(count - 1).unwrap_or_default(),
            _ => 0,
        };
        let milliseconds = seconds
            .saturating_mul(1000)
            .saturating_add(nanoseconds.div_euclid(1_000_000));
        Self { milliseconds, uses }
    }

    /// Reads the modification time of what `stat` returned.
    pub(in crate::store) fn of(stat: &rustix::fs::Stat) -> Self {
        #[allow(
            clippy::unnecessary_cast,
            clippy::cast_possible_wrap,
            reason = "the fields' types differ between targets"
        )]
        Self::from_time(stat.st_mtime as i64, stat.st_mtime_nsec as i64)
    }

    /// Reads the modification time of a file's status.
    pub(in crate::store) fn of_status(status: &FileStatus) -> Self {
        // No time before 1970 is in a status.
        let time = status.modified.duration_since(UNIX_EPOCH);
        let time = time.unwrap_or_default();
        let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        Self::from_time(seconds, i64::from(time.subsec_nanos()))
    }

    /// Returns the modification time for a file: whole seconds and nanoseconds.
    pub fn time(self) -> (i64, i64) {
        let seconds = self.milliseconds.div_euclid(1000);
        let rest = self.milliseconds.rem_euclid(1000) * 1_000_000;
        (seconds, rest + 1000 * (i64::from(self.uses) + 1))
    }

    /// Returns the times to set: this as modification time, the time of access left alone.
    pub(super) fn timestamps(self) -> Timestamps {
        let (tv_sec, tv_nsec) = self.time();
        #[allow(
            clippy::useless_conversion,
            clippy::unnecessary_cast,
            reason = "the type of nanoseconds differs between targets"
        )]
        Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec,
                tv_nsec: tv_nsec as _,
            },
        }
    }

    /// Returns when the chunk was last used, in milliseconds since 1970.
    pub fn milliseconds(self) -> i64 {
        self.milliseconds
    }

    /// Returns how often the chunk was used again since it was stored, as far as it is counted.
    pub fn uses(self) -> u8 {
        self.uses
    }
}

/// Returns the time of a use: a chunk is always older than the chunk before it, so that a prefix
/// loses its tail before its head.
fn time_of_use(now: i64, parent: Option<i64>) -> i64 {
    parent.map_or(now, |parent| now.min(parent.saturating_sub(BEFORE)))
}

/// Returns a time in milliseconds since 1970.
pub(super) fn milliseconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => whole_milliseconds(since),
        Err(before) => -whole_milliseconds(before.duration()),
    }
}

/// Returns a duration in whole milliseconds.
pub(super) fn whole_milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_stamp_survives_the_modification_time(time in -(1_i64 << 50)..1 << 50, uses in 0..=USES_MAX) {
            let stamp = Stamp::new(time, uses);
            let (seconds, nanoseconds) = stamp.time();
            prop_assert!((0..1_000_000_000).contains(&nanoseconds));
            prop_assert_eq!(Stamp::from_time(seconds, nanoseconds), stamp);
        }

        #[test]
        fn a_chunk_is_older_than_the_one_before_it(
            now in 0..1_i64 << 45, parent in 0..1_i64 << 45, own in 0..1_i64 << 45, uses in 0..=USES_MAX,
        ) {
            let first = Stamp::first(now, Some(parent));
            prop_assert!(first.milliseconds() < parent && first.milliseconds() <= now);
            prop_assert_eq!(Stamp::first(now, None), Stamp::new(now, 0));
            if let Some(renewed) = Stamp::new(own, uses).renewed(now, Some(parent)) {
                prop_assert!(renewed.milliseconds() < parent && renewed.milliseconds() <= now);
                prop_assert!(renewed.milliseconds() >= own + RENEWED_AFTER_MILLISECONDS);
                prop_assert_eq!(renewed.uses(), (uses + 1).min(USES_MAX));
            }
        }

        #[test]
        fn any_time_is_read(seconds in any::<i64>(), nanoseconds in any::<i64>()) {
            prop_assert!(Stamp::from_time(seconds, nanoseconds).uses() <= USES_MAX);
        }
    }

    #[test]
    fn times_of_other_programs_count_no_uses() {
        assert_eq!(Stamp::from_time(5, 123_456_789), Stamp::new(5123, 0));
        assert_eq!(Stamp::from_time(5, 0), Stamp::new(5000, 0));
        assert_eq!(Stamp::from_time(5, 17_000), Stamp::new(5000, 0));
        assert_eq!(Stamp::from_time(5, 16_000), Stamp::new(5000, 15));
    }
}
