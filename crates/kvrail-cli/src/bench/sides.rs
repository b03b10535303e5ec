//! Who is measured against whom, and what each took in a round.

use std::collections::BTreeMap;

use super::clients::Sample;

/// One of those that do the same work in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    /// kvrail with one of the engines, by its place in the plan.
    Kvrail(usize),
    /// Bare system calls, or bare copies where nothing is read from a file.
    Raw,
    /// Bare copies of as many bytes, where the raw side reads files from the page cache.
    Memcpy,
    /// The benchmark `fio`.
    Fio,
}

/// All sides of one operation in one round.
#[derive(Debug, Default)]
pub(crate) struct Sides {
    samples: BTreeMap<Side, Sample>,
}

impl Sides {
    /// Adds what a side took.
    pub(crate) fn add(&mut self, side: Side, sample: Sample) {
        self.samples.entry(side).or_default().add(sample);
    }

    /// Returns what a side took; `None` where it took no part.
    pub(crate) fn get(&self, side: Side) -> Option<&Sample> {
        self.samples.get(&side)
    }
}

/// One counted round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) store: Sides,
    pub(crate) load: Sides,
    /// Both at the same time, of the chunks of the first wave.
    pub(crate) mix: Sides,
    /// Chunks that each kvrail loaded from its own memory.
    pub(crate) from_memory: Vec<u64>,
}

/// Returns who goes when: each side first in its turn, so that none always finds the disk as the
/// same other one left it.
pub(crate) fn in_turn<T: Copy>(sides: &[T], index: usize) -> Vec<T> {
    let mut order = sides.to_vec();
    let count = order.len().max(1);
    order.rotate_left(index % count);
    // Forwards and backwards: neighbours change places as well.
    if (index / count) % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_is_first_as_often_as_the_others_and_follows_all_others() {
        let sides = [Side::Kvrail(0), Side::Kvrail(1), Side::Raw, Side::Fio];
        let orders: Vec<_> = (0..8).map(|index| in_turn(&sides, index)).collect();
        for side in sides {
            let first = orders.iter().filter(|order| order[0] == side).count();
            assert_eq!(first, 2, "{side:?}");
            let before: std::collections::BTreeSet<_> = orders
                .iter()
                .flat_map(|order| order.windows(2))
                .filter(|pair| pair[1] == side)
                .map(|pair| pair[0])
                .collect();
            assert!(before.len() >= 2, "{side:?} only follows {before:?}");
        }
    }

    #[test]
    fn a_side_that_took_no_part_has_no_sample() {
        let mut sides = Sides::default();
        let sample = Sample {
            seconds: 1.5,
            ..Sample::default()
        };
        sides.add(Side::Raw, sample.clone());
        sides.add(Side::Raw, sample);
        assert_eq!(sides.get(Side::Raw).map(|found| found.seconds), Some(3.0));
        assert!(sides.get(Side::Fio).is_none());
    }
}
