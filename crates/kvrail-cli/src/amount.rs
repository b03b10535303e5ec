//! Reading amounts from arguments: ages, rates, samples.

use std::time::Duration;

/// Seconds of each unit of an age.
const AGE_UNITS: [(&str, u64); 5] = [
    ("s", 1),
    ("min", 60),
    ("h", 3_600),
    ("d", 86_400),
    ("w", 604_800),
];
/// Bytes of each unit of a size, as in the configuration.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// Which chunks are checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Sample {
    /// So many of each million.
    Share(u32),
    /// So many of all.
    Count(usize),
}

/// Chunks of a sample at most: they are held in memory.
const SAMPLE_MAX: usize = 1_000_000;

/// Reads an age such as `30d`, `12h`, `90min`.
pub(crate) fn age(text: &str) -> Result<Duration, String> {
    let expected = "expected a whole number with a unit: s, min, h, d or w, like 30d";
    number_with_unit(text, &AGE_UNITS)
        .map(Duration::from_secs)
        .ok_or_else(|| expected.to_owned())
}

/// Reads bytes per second such as `200MB` or `1GiB`, with or without `/s`.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let text = text.trim();
    number_with_unit(text.strip_suffix("/s").unwrap_or(text), &SIZE_UNITS)
        .filter(|rate| *rate > 0)
        .ok_or_else(|| "expected a size per second above 0, like 200MB or 1GiB".to_owned())
}

/// Reads a sample: `5%`, `0.05` or a number of chunks.
pub(crate) fn sample(text: &str) -> Result<Sample, String> {
    let text = text.trim();
    let expected =
        format!("expected a share like 5% or 0.05, or a number of chunks from 1 to {SAMPLE_MAX}");
    let plain = |text: &str| -> Option<f64> {
        let digits = text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.');
        digits.then(|| text.parse().ok())?
    };
    let share = match text.strip_suffix('%') {
        Some(percent) => plain(percent).map(|percent| percent / 100.0),
        None if text.contains('.') => plain(text),
        None => {
            let count = text.parse().ok();
            return count
                .filter(|count| (1..=SAMPLE_MAX).contains(count))
                .map(Sample::Count)
                .ok_or(expected);
        }
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and a million"
    )]
    share
        .filter(|share| (0.000_001..=1.0).contains(share))
        .map(|share| Sample::Share((share * 1e6).round() as u32))
        .ok_or(expected)
}

fn number_with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (digits, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    digits.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(age("90 min"), Ok(Duration::from_secs(5_400)));
        assert_eq!(rate("200MB"), Ok(200_000_000));
        assert_eq!(rate("1GiB/s"), Ok(1 << 30));
        assert_eq!(sample("5%"), Ok(Sample::Share(50_000)));
        assert_eq!(sample("0.05"), Ok(Sample::Share(50_000)));
        assert_eq!(sample("100%"), Ok(Sample::Share(1_000_000)));
        assert_eq!(sample("1000"), Ok(Sample::Count(1000)));
        for text in [
            "",
            "30",
            "d",
            "-1d",
            "30 days",
            "1e3s",
            "99999999999999999999d",
        ] {
            assert!(age(text).is_err(), "{text}");
        }
        for text in ["0MB", "200", "fast", "MB"] {
            assert!(rate(text).is_err(), "{text}");
        }
        for text in [
            "0",
            "0%",
            "101%",
            "1.5",
            "-5%",
            "inf%",
            "some",
            "9999999999",
            "1.2.3",
        ] {
            assert!(sample(text).is_err(), "{text}");
        }
    }
}
