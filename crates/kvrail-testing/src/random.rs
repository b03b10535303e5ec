//! Numbers that follow from a seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// A generator (SplitMix64): small, and the same everywhere for the same seed.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Makes a generator.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Returns the next number.
    pub fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut value = self.state;
        value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^ (value >> 31)
    }

    /// Returns a number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// Returns true in a share `probability` of all calls.
    pub fn chance(&mut self, probability: f64) -> bool {
        // 53 bits are what a double holds.
        ((self.number() >> 11) as f64 / (1_u64 << 53) as f64) < probability
    }

    /// Returns one of several things.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        let index = self.below(things.len() as u64) as usize;
        &things[index]
    }
}

/// Returns a seed from the clock, for runs that shall differ; whoever uses it prints it.
pub fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64) & 0xFFFF_FFFF
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_chances_are_kept() {
        let (mut first, mut second) = (Random::new(7), Random::new(7));
        assert!((0..100).all(|_| first.number() == second.number()));
        let hits = (0..10_000).filter(|_| first.chance(0.25)).count();
        assert!((2300..2700).contains(&hits), "{hits}");
    }
}
