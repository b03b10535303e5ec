//! What lookups found lately, so that asking again costs no file operation.
//!
//! Prompts share prefixes: the same chunks are asked for by one request after the other. An answer
//! that is out of date costs little. A chunk that was evicted meanwhile fails to load and is
//! computed, as it would have been. That a chunk is missing is not believed: another process, a
//! worker of this instance for one, may store it in the next moment, and asking costs one look.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};

use super::present::Place;
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Answers in each of the two generations: 65,536 in all, about 7 MB, half a million tokens a rank
/// more than the longest prompts.
const ANSWERS_MAX: usize = 32_768;

/// The answers that lookups gave lately.
#[derive(Debug)]
pub(super) struct KnownAnswers {
    holds: Duration,
    state: Mutex<Generations>,
}

/// Two generations: when the young one is full it becomes the old one, which is forgotten.
#[derive(Debug, Default)]
struct Generations {
    young: Answers,
    old: Answers,
}

/// When each chunk was there.
type Answers = HashMap<Place, Instant, BuildHasherDefault<KeyHasher>>;

impl KnownAnswers {
    /// Makes one whose answers hold for `holds`. Zero: nothing is known.
    pub(super) fn new(holds: Duration) -> Self {
        Self {
            holds,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an answer, or of a chunk that was stored, loaded or found missing.
    pub(super) fn note(&self, place: Place, is_there: bool) {
        if self.holds.is_zero() {
            return;
        }
        let mut state = self.lock();
        if !is_there {
            state.young.remove(&place);
            state.old.remove(&place);
            return;
        }
        if state.young.len() >= ANSWERS_MAX {
            state.old = std::mem::take(&mut state.young);
        }
        state.young.insert(place, Instant::now());
    }

    /// Returns how many leading places are known to be there.
    pub(super) fn leading(&self, places: impl Iterator<Item = Place>) -> usize {
        if self.holds.is_zero() {
            return 0;
        }
        let now = Instant::now();
        let state = self.lock();
        let is_known = |place: &Place| {
            let at = state.young.get(place).or_else(|| state.old.get(place));
            at.is_some_and(|at| now.saturating_duration_since(*at) < self.holds)
        };
        places.take_while(is_known).count()
    }
}

/// Takes a part of what it hashes for the hash: keys are hashes themselves (SHA-256 of vLLM), and a
/// lookup asks for hundreds of them.
#[derive(Debug, Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // The first eight bytes of a key: the shortest one has no more.
        let word = bytes
            .iter()
            .take(8)
            .fold(0_u64, |word, byte| (word << 8) | u64::from(*byte));
        // 2^64 divided by the golden ratio (Knuth, TAOCP 3, 6.4): spreads small numbers.
        self.0 = (self.0 ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(32)
            ^ self.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{ChunkKey, Part};

    fn place(index: u64) -> Place {
        let key = blake3::hash(&index.to_le_bytes());
        (0, 0.into(), ChunkKey::from_bytes(key.as_bytes()).unwrap())
    }

    fn leading(known: &KnownAnswers, range: std::ops::Range<u64>) -> usize {
        known.leading(range.map(place))
    }

    #[test]
    fn a_prefix_is_known_up_to_what_is_not() {
        let known = KnownAnswers::new(Duration::from_secs(100));
        assert_eq!(leading(&known, 0..5), 0);
        (0..3).for_each(|index| known.note(place(index), true));
        assert_eq!(leading(&known, 0..3), 3);
        assert_eq!(leading(&known, 0..5), 3, "3 is not known");
        known.note(place(3), true);
        assert_eq!(leading(&known, 0..5), 4);
        known.note(place(1), false);
        assert_eq!(leading(&known, 0..5), 1, "gone since");
    }

    #[test]
    fn answers_hold_for_a_while() {
        let holds = Duration::from_millis(400);
        let known = KnownAnswers::new(holds);
        known.note(place(0), true);
        assert_eq!(leading(&known, 0..2), 1);
        std::thread::sleep(holds);
        assert_eq!(leading(&known, 0..2), 0);
        let nothing = KnownAnswers::new(Duration::ZERO);
        nothing.note(place(0), true);
        assert_eq!(leading(&nothing, 0..1), 0);
    }

    #[test]
    fn what_was_noted_last_is_known_and_the_number_is_bounded() {
        let known = KnownAnswers::new(Duration::from_secs(100));
        let count = 3 * ANSWERS_MAX as u64;
        (0..count).for_each(|index| known.note(place(index), true));
        let state = known.lock();
        assert!(state.young.len() <= ANSWERS_MAX && state.old.len() <= ANSWERS_MAX);
        drop(state);
        let last = count - ANSWERS_MAX as u64;
        assert_eq!(leading(&known, last..count), ANSWERS_MAX);
    }

    #[test]
    fn keys_of_one_prefix_are_spread() {
        let hash = |place: Place| {
            use std::hash::BuildHasher;
            BuildHasherDefault::<KeyHasher>::default().hash_one(place)
        };
        let low: std::collections::HashSet<u64> =
            (0..1000).map(|index| hash(place(index)) & 0xFFFF).collect();
        assert!(low.len() > 950, "{}", low.len());
        let ranks: std::collections::HashSet<u64> = (0..8)
            .map(|rank| hash((0, Part::from(rank), place(1).2)) & 0xFFFF)
            .collect();
        assert_eq!(ranks.len(), 8);
    }
}
