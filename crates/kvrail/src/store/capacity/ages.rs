//! How old the chunks of a store are, from a bounded sample of them.
//!
//! Every chunk that is seen has the same chance to be in the sample (reservoir sampling), so a
//! share of its bytes is, within the error of sampling, that share of all bytes. Up to
//! [`SAMPLE_MAX`] chunks the sample is all of them, and the order is exact.

/// Chunks in the sample, 256 KiB. The age below which 10% of the bytes lie is off by 0.23% of the
/// bytes (one standard deviation, `sqrt(0.1 * 0.9 / 16384)`).
pub const SAMPLE_MAX: usize = 16_384;

/// A sample of chunks by age.
#[derive(Debug, Clone)]
pub struct AgeSample {
    /// Age in milliseconds, bytes.
    chunks: Vec<(i64, u64)>,
    seen: u64,
    random: u64,
}

impl AgeSample {
    /// Makes an empty sample; `seed` decides what is drawn.
    pub fn new(seed: u64) -> Self {
        Self {
            chunks: Vec::new(),
            seen: 0,
            random: seed | 1,
        }
    }

    /// Shows it a chunk.
    pub fn add(&mut self, age_milliseconds: i64, bytes: u64) {
        self.seen += 1;
        if self.chunks.len() < SAMPLE_MAX {
            self.chunks.push((age_milliseconds, bytes));
            return;
        }
        let drawn = self.next_random() % self.seen;
        let place = usize::try_from(drawn).ok();
        if let Some(chunk) = place.and_then(|place| self.chunks.get_mut(place)) {
            *chunk = (age_milliseconds, bytes);
        }
    }

    /// Returns the number of chunks that it was shown.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Returns the age from which on chunks make up `share` of all bytes, `None` if there are none.
    ///
    /// A share below one chunk of the sample is rounded up to it.
    pub fn oldest(&mut self, share: f64) -> Option<i64> {
        self.chunks
            .sort_unstable_by_key(|(age, _)| std::cmp::Reverse(*age));
        let total: u64 = self.chunks.iter().map(|(_, bytes)| bytes).sum();
        let wanted = (total as f64 * share.clamp(0.0, 1.0)) as u64;
        let mut sum = 0;
        let reached = self.chunks.iter().find(|(_, bytes)| {
            sum += bytes;
            sum >= wanted
        });
        reached.or(self.chunks.last()).map(|(age, _)| *age)
    }

    /// Returns the next pseudo-random number (xorshift64*).
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_store_is_ordered_exactly() {
        let mut sample = AgeSample::new(7);
        assert_eq!(sample.oldest(0.5), None);
        (0..1000).for_each(|age| sample.add((age * 7919) % 1000, 10));
        for (share, age) in [(0.0, 999), (0.001, 999), (0.25, 750), (1.0, 0)] {
            assert_eq!(sample.oldest(share), Some(age), "{share}");
        }
    }

    #[test]
    fn bytes_count_and_not_chunks() {
        let mut sample = AgeSample::new(7);
        sample.add(100, 1);
        sample.add(50, 99);
        sample.add(10, 100);
        assert_eq!(sample.oldest(0.5), Some(50));
    }

    #[test]
    fn ten_million_chunks_in_any_order_need_one_small_sample() {
        const CHUNKS: i64 = 10_000_000;
        for step in [1, 7_654_321, CHUNKS - 1] {
            let mut sample = AgeSample::new(42);
            (0..CHUNKS).for_each(|index| sample.add(index * step % CHUNKS, 1));
            assert_eq!(sample.chunks.len(), SAMPLE_MAX);
            for share in [0.01, 0.1, 0.5] {
                let found = 1.0 - sample.oldest(share).unwrap() as f64 / CHUNKS as f64;
                // Five standard deviations.
                let error = 5.0 * (share * (1.0 - share) / SAMPLE_MAX as f64).sqrt();
                assert!(
                    (found - share).abs() < error,
                    "{step}: {share} became {found}"
                );
            }
        }
    }
}
