//! Medians and percentiles of a few measurements.

use serde::Serialize;

/// The middle of some measurements and how far they spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// Half of the measurements are below.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
}

impl Spread {
    /// Summarizes measurements; all zero where there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(at(middle.saturating_sub(1)), at(middle))
        } else {
            at(middle)
        };
        Self {
            median,
            min: at(0),
            max: at(values.len().saturating_sub(1)),
        }
    }
}

/// Returns the value that `percent` of the measurements do not exceed (nearest rank); 0 where there
/// are none.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        assert_eq!(
            Spread::of([4.0, 1.0, 3.0, 2.0]),
            Spread {
                median: 2.5,
                min: 1.0,
                max: 4.0
            }
        );
        assert_eq!(Spread::of([5.0, 1.0, 3.0]).median, 3.0);
        assert_eq!(Spread::of([]).median, 0.0);
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let values = || (1..=100).map(f64::from);
        assert_eq!(percentile(values(), 50), 50.0);
        assert_eq!(percentile(values(), 99), 99.0);
        assert_eq!(percentile([7.0, 9.0], 99), 9.0);
        assert_eq!(percentile([], 50), 0.0);
    }
}
