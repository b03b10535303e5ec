//! On which path a chunk lies.
//!
//! By hash: weighted rendezvous. A path's score for a chunk depends on that path only, on its
//! weight and on a hash of its name and the chunk's key, and the best score has the chunk. So a
//! path that is added, removed or weighted anew moves only chunks to it or from it, and the order
//! of the list does not matter. By GPU: the rank modulo the number of paths, as LMCache does; for a
//! part that is a range of heads, [`Part::number`].
//!
//! All that share the paths must come to the same answer, so nothing here is a floating-point
//! number, whose logarithm differs between machines in its last digit: docs/format.md has vectors.

use std::cmp::Ordering;
use std::path::Path;

use twox_hash::XxHash3_64;

use crate::chunk::{ChunkKey, Part};
use crate::config::PathSharding;

/// Binary digits behind the point of a [`distance`].
const DIGITS: u32 = 48;

/// Which path holds which chunk.
#[derive(Debug)]
pub(super) struct Placement {
    sharding: PathSharding,
    places: Vec<Place>,
}

/// A path as a chunk sees it.
#[derive(Debug, Clone, Copy)]
struct Place {
    seed: u64,
    weight: u64,
}

/// How well a chunk and a path go together: `weight / distance`, and what decides between equals.
#[derive(Debug, Clone, Copy)]
struct Score {
    weight: u64,
    distance: u64,
    hash: u64,
    seed: u64,
}

impl Placement {
    /// Places chunks on paths in the order of the configuration, each with its weight: how large
    /// its share is among the others'. A weight of 0 counts as 1.
    pub(super) fn new<'a>(
        sharding: PathSharding,
        paths: impl IntoIterator<Item = (&'a Path, u64)>,
    ) -> Self {
        let place = |(path, weight): (&Path, u64)| Place {
            seed: XxHash3_64::oneshot(path.as_os_str().as_encoded_bytes()),
            weight: weight.max(1),
        };
        Self {
            sharding,
            places: paths.into_iter().map(place).collect(),
        }
    }

    /// Returns the index of the path that holds a part of a chunk.
    pub(super) fn index(&self, part: Part, key: &ChunkKey) -> usize {
        match self.sharding {
            PathSharding::ByGpu => part.number() % self.places.len().max(1),
            PathSharding::ByHash if self.places.len() <= 1 => 0,
            PathSharding::ByHash => {
                let scores = self.places.iter().map(|place| place.score(key)).enumerate();
                let best = scores.max_by(|(_, one), (_, other)| one.compare(other));
                best.map_or(0, |(index, _)| index)
            }
        }
    }
}

impl Place {
    fn score(self, key: &ChunkKey) -> Score {
        let hash = XxHash3_64::oneshot_with_seed(self.seed, key.as_bytes());
        Score {
            weight: self.weight,
            distance: distance(hash),
            hash,
            seed: self.seed,
        }
    }
}

impl Score {
    /// Compares `weight / distance` without a division, then the hashes: among equal weights the
    /// largest hash wins, whatever the logarithm rounds away.
    fn compare(&self, other: &Self) -> Ordering {
        let times = |weight: u64, distance: u64| u128::from(weight) * u128::from(distance);
        times(self.weight, other.distance)
            .cmp(&times(other.weight, self.distance))
            .then(self.hash.cmp(&other.hash))
            .then(self.seed.cmp(&other.seed))
    }
}

/// Returns `-log2(u)` in units of 2^-48, for `u = (2 * hash + 1) / 2^65`, which lies between 0 and
/// 1: from 1 for the largest hashes to 65 * 2^48 for the smallest one. It never grows with the hash.
///
/// The logarithm is found digit by digit: a number between 1 and 2 is squared, and its logarithm's
/// next digit is whether that is 2 or more.
fn distance(hash: u64) -> u64 {
    let number = (u128::from(hash) << 1) | 1;
    let whole = 127 - number.leading_zeros();
    // As a fraction of 2^63, between 1 and 2; cut off where it does not fit.
    let mut mantissa = match whole.checked_sub(63) {
        Some(shift) => number >> shift,
        None => number << (63 - whole),
    };
    let mut digits = 0_u64;
    for _ in 0..DIGITS {
        mantissa = (mantissa * mantissa) >> 63;
        let digit = (mantissa >> 64) as u64;
        mantissa >>= digit;
        digits = (digits << 1) | digit;
    }
    (65 << DIGITS) - ((u64::from(whole) << DIGITS) | digits)
}

#[cfg(test)]
mod tests;
