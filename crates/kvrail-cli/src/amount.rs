//! Reading amounts from arguments: ages, rates, samples.

use std::time::Duration;

use kvrail::config;
use serde_json::Value;

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
    let seconds = config::age(text).filter(|_| has_unit(text));
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected a number with a unit: s, min, h, d or w, like 30d".to_owned())
}

/// Reads a size such as `500GB`, `512MiB` or a number of bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    config::size(&Value::String(text.to_owned()))
        .ok_or_else(|| "expected a size like 500GB or 512MiB, or a number of bytes".to_owned())
}

/// Reads bytes per second such as `200MB` or `1GiB`, with or without `/s`.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let amount = text.strip_suffix("/s").unwrap_or(text);
    size(amount)
        .ok()
        .filter(|rate| *rate > 0 && has_unit(amount))
        .ok_or_else(|| "expected a size per second above 0, like 200MB or 1GiB".to_owned())
}

/// Returns whether an amount ends with a unit. Where one number removes or slows down much, a unit
/// that was forgotten is a mistake rather than seconds or bytes.
fn has_unit(text: &str) -> bool {
    text.trim_end()
        .ends_with(|letter: char| letter.is_ascii_alphabetic())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(age("90 min"), Ok(Duration::from_secs(5_400)));
        assert_eq!(age("1.5h"), Ok(Duration::from_secs(5_400)));
        assert_eq!(size("1TiB"), Ok(1 << 40));
        assert_eq!(size("0"), Ok(0));
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
