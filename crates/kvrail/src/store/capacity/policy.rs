//! Which chunks go first, as numbers: the age by which eviction orders chunks.

use super::stamp::Stamp;
use crate::config::EvictionPolicy;

/// Uses beyond which a chunk gets no younger: an eighth of its age, so that what was popular once
/// is gone after eight times the life of what never was.
const HALVINGS_MAX: u8 = 3;

impl EvictionPolicy {
    /// Returns the age of a chunk in milliseconds as eviction sees it: the highest goes first.
    ///
    /// A stamp of the future, from a host whose clock is ahead, has age 0.
    pub fn age(self, stamp: Stamp, now_milliseconds: i64) -> i64 {
        let age = now_milliseconds.saturating_sub(stamp.milliseconds()).max(0);
        match self {
            Self::Lru => age,
            Self::Reuse => age >> stamp.uses().min(HALVINGS_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuse_makes_younger_and_neither_policy_knows_the_future() {
        let now = 1_000_000;
        let age = |policy: EvictionPolicy, uses| policy.age(Stamp::new(now - 8000, uses), now);
        assert_eq!(age(EvictionPolicy::Lru, 5), 8000);
        let ages = [0, 1, 2, 3, 15].map(|uses| age(EvictionPolicy::Reuse, uses));
        assert_eq!(ages, [8000, 4000, 2000, 1000, 1000]);
        assert_eq!(EvictionPolicy::Lru.age(Stamp::new(now + 5, 0), now), 0);
        assert_eq!(
            EvictionPolicy::Lru.age(Stamp::new(i64::MIN, 0), i64::MAX),
            i64::MAX
        );
    }
}
