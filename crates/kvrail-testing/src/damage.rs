//! Bytes that change on their way.

use crate::random::Random;

/// The unit in which disks and page caches go wrong.
const PAGE_BYTES: usize = 4096;

/// How bytes are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit is flipped.
    Flip,
    /// A page reads as zeros.
    Zero,
    /// Two pages change places; of a single page, its two halves.
    Swap,
}

impl Damage {
    /// Changes `bytes`; `choice` decides where. Returns whether any byte is another one now.
    pub fn apply(self, bytes: &mut [u8], choice: u64) -> bool {
        if bytes.is_empty() {
            return false;
        }
        let before = bytes.to_vec();
        let mut random = Random::new(choice);
        let place = random.below(bytes.len() as u64) as usize;
        match self {
            Self::Flip => bytes[place] ^= 1 << random.below(8),
            Self::Zero => {
                let start = place / PAGE_BYTES * PAGE_BYTES;
                let end = bytes.len().min(start + PAGE_BYTES);
                bytes[start..end].fill(0);
            }
            Self::Swap => {
                let unit = if bytes.len() >= 2 * PAGE_BYTES {
                    PAGE_BYTES
                } else {
                    bytes.len() / 2
                };
                let count = bytes.len() / unit.max(1);
                if count < 2 {
                    return false;
                }
                let first = random.below(count as u64 - 1) as usize;
                let (left, right) = bytes.split_at_mut((first + 1) * unit);
                left[first * unit..].swap_with_slice(&mut right[..unit]);
            }
        }
        before != bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damage_changes_bytes_of_its_own_place_only() {
        for (damage, most) in [
            (Damage::Flip, 1),
            (Damage::Zero, 4096),
            (Damage::Swap, 8192),
        ] {
            for choice in 0..20 {
                let good: Vec<u8> = (0..5 * PAGE_BYTES)
                    .map(|i| (i * i % 253 + 1) as u8)
                    .collect();
                let mut bad = good.clone();
                assert!(damage.apply(&mut bad, choice), "{damage:?} {choice}");
                let changed = good.iter().zip(&bad).filter(|(a, b)| a != b).count();
                assert!((1..=most).contains(&changed), "{damage:?}: {changed}");
            }
        }
    }
}
