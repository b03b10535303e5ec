//! Which chunks this process was given before: what second-use admission asks.
//!
//! Two Bloom filters, of which one is filled while both are asked. When it is full the older one
//! is emptied and takes its place, so what was given long ago is forgotten and memory is bounded.

use twox_hash::XxHash3_64;

/// Chunks that one filter takes before the other one is emptied.
const CHUNKS_MAX: usize = 262_144;
/// Bits of a filter: 16 for each chunk, so that with 4 positions 1 in 400 chunks is wrongly taken
/// for one that was seen, when the filter is full. 512 KiB each.
const BITS: usize = 16 * CHUNKS_MAX;
/// Bits that a chunk sets.
const POSITIONS: u64 = 4;

/// The chunks that were shown to it lately: at least the last 262,144.
#[derive(Debug, Clone)]
pub struct SeenChunks {
    current: Vec<u64>,
    former: Vec<u64>,
    count: usize,
}

impl Default for SeenChunks {
    fn default() -> Self {
        Self {
            current: vec![0; BITS / 64],
            former: vec![0; BITS / 64],
            count: 0,
        }
    }
}

impl SeenChunks {
    /// Shows it a chunk. Returns whether it was shown that chunk before.
    pub fn show(&mut self, key: &[u8]) -> bool {
        let hash = XxHash3_64::oneshot(key);
        // Two hashes make as many positions as are needed (Kirsch and Mitzenmacher, 2006).
        let (first, step) = (hash & 0xFFFF_FFFF, hash >> 32 | 1);
        let (mut in_current, mut in_former) = (true, true);
        for index in 0..POSITIONS {
            let bit = first.wrapping_add(index.wrapping_mul(step)) as usize % BITS;
            let (word, mask) = (bit / 64, 1_u64 << (bit % 64));
            in_former &= self.former.get(word).is_some_and(|word| word & mask != 0);
            if let Some(word) = self.current.get_mut(word) {
                in_current &= *word & mask != 0;
                *word |= mask;
            }
        }
        if !in_current {
            self.count += 1;
            if self.count >= CHUNKS_MAX {
                std::mem::swap(&mut self.current, &mut self.former);
                self.current.fill(0);
                self.count = 0;
            }
        }
        in_current || in_former
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shown_lately_is_known_and_little_else() {
        let mut seen = SeenChunks::default();
        let mut wrong = 0;
        for index in 0..3 * CHUNKS_MAX as u64 {
            wrong += usize::from(seen.show(&index.to_le_bytes()));
            if index >= 1000 {
                let lately = index - 1000;
                assert!(
                    seen.clone_bits(&lately.to_le_bytes()),
                    "{lately} was forgotten"
                );
            }
        }
        // Both filters are asked, each at most 1 in 400 wrong.
        assert!(wrong < 3 * CHUNKS_MAX / 150, "{wrong} wrongly known");
        // Two fillings ago.
        let forgotten = (0..1000_u64).filter(|index| !seen.clone_bits(&index.to_le_bytes()));
        assert!(forgotten.count() > 900);
    }

    impl SeenChunks {
        /// Asks without showing.
        fn clone_bits(&self, key: &[u8]) -> bool {
            let hash = XxHash3_64::oneshot(key);
            let (first, step) = (hash & 0xFFFF_FFFF, hash >> 32 | 1);
            [&self.current, &self.former].iter().any(|filter| {
                (0..POSITIONS).all(|index| {
                    let bit = first.wrapping_add(index * step) as usize % BITS;
                    filter[bit / 64] & 1 << (bit % 64) != 0
                })
            })
        }
    }
}
