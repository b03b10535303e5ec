//! Typed reading of one value, as YAML or JSON has it or as the text of an environment variable.
//!
//! Each function returns the typed value, or what it had expected as the end of a sentence; who
//! calls it knows the key and the source and makes the error.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde_json::Value;

use super::choices::{MinFree, PathWeights};
use super::file_mode::FileMode;
use super::store_config::{PATH_WEIGHT, check_path, check_paths};

/// A typed value, or what was expected instead.
pub(super) type Parsed<T> = std::result::Result<T, String>;

/// Names of units and their bytes: decimal as storage is sold, binary as memory is.
const UNITS: [(&str, u64); 12] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("pb", 1_000_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("pib", 1 << 50),
];

/// Largest whole number up to which a double holds every whole number (2^53).
const EXACT_DOUBLE: f64 = 9_007_199_254_740_992.0;

/// Returns whether a value says nothing, so that the next source counts.
pub(super) fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(items) => items.iter().all(is_unset),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Reads a switch: a boolean, 1 or 0, or one of the words that mean one.
pub(super) fn boolean(value: &Value) -> Parsed<bool> {
    let text = match value {
        Value::Bool(switch) => return Ok(*switch),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.trim().to_ascii_lowercase(),
        _ => String::new(),
    };
    match text.as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("true or false (also 1, 0, yes, no, on, off)".to_owned()),
    }
}

/// Reads a switch that may also be left to a probe with the word `auto`.
pub(super) fn boolean_or_auto(value: &Value) -> Parsed<Option<bool>> {
    if is_word(value, "auto") {
        return Ok(None);
    }
    boolean(value)
        .map(Some)
        .map_err(|_| "auto, true or false".to_owned())
}

/// Reads a whole number within `range`.
pub(super) fn whole(value: &Value, range: &RangeInclusive<u64>, unit: &str) -> Parsed<usize> {
    let number = match value {
        Value::Number(number) => number.as_u64().or_else(|| exact(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|number| range.contains(number))
        .and_then(|number| usize::try_from(number).ok())
        .ok_or_else(|| format!("{} ({unit})", span(range)))
}

/// Reads a whole number within `range`, or the word `auto`.
pub(super) fn whole_or_auto(
    value: &Value,
    range: &RangeInclusive<u64>,
    unit: &str,
) -> Parsed<Option<usize>> {
    if is_word(value, "auto") {
        return Ok(None);
    }
    whole(value, range, unit)
        .map(Some)
        .map_err(|expected| format!("auto, or {expected}"))
}

/// Reads a number within `range`.
pub(super) fn number(value: &Value, range: &RangeInclusive<f64>, unit: &str) -> Parsed<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| {
            format!(
                "a number from {} to {} ({unit})",
                range.start(),
                range.end()
            )
        })
}

/// Reads a limit in bytes; the word `unlimited` is no limit.
pub(super) fn limit(value: &Value) -> Parsed<Option<u64>> {
    if is_word(value, "unlimited") {
        return Ok(None);
    }
    size(value)
        .filter(|bytes| *bytes > 0)
        .map(Some)
        .ok_or_else(|| {
            "a size above 0 like \"500GB\" or \"512MiB\", a number of bytes, or \"unlimited\""
                .to_owned()
        })
}

/// Reads a share within `range`: a percentage as text, or a number.
pub(super) fn share_within(value: &Value, range: &RangeInclusive<f64>) -> Parsed<f64> {
    let share = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.trim().strip_suffix('%') {
            Some(percent) => decimal(percent.trim()).map(|percent| percent / 100.0),
            None => decimal(text.trim()),
        },
        _ => None,
    };
    share.filter(|share| range.contains(share)).ok_or_else(|| {
        format!(
            "a share from {} to {} like \"90%\" or 0.9",
            range.start(),
            range.end()
        )
    })
}

/// Reads how long something is kept; the word `unlimited` is for ever.
pub(super) fn ttl(value: &Value, range: &RangeInclusive<f64>) -> Parsed<Option<f64>> {
    if is_word(value, "unlimited") {
        return Ok(None);
    }
    let seconds = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => age(text),
        _ => None,
    };
    seconds
        .filter(|seconds| range.contains(seconds))
        .map(Some)
        .ok_or_else(|| {
            format!(
                "an age of {} seconds or more like \"7d\", \"12h\" or \"30min\", a number of \
                 seconds, or \"unlimited\"",
                range.start()
            )
        })
}

/// Reads an age in seconds from text: a number, or one with the unit `s`, `min`, `h`, `d` or `w`.
pub fn age(text: &str) -> Option<f64> {
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let seconds = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "s" => 1.0,
        "min" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        "w" => 604_800.0,
        _ => return None,
    };
    Some(decimal(digits)? * seconds)
}

/// Reads the free space to leave: a percentage, a share below 1, or a size.
///
/// What is written with a decimal point and no unit is a share, so that 1.0 is refused rather than
/// taken for one byte.
pub(super) fn min_free(value: &Value) -> Parsed<MinFree> {
    let parsed = match value {
        Value::Number(number) if number.is_f64() => number.as_f64().and_then(share),
        Value::String(text) => match text.trim().strip_suffix('%') {
            Some(percent) => decimal(percent.trim()).and_then(|percent| share(percent / 100.0)),
            None => match decimal(text.trim()) {
                Some(number) if text.contains('.') => share(number),
                _ => size(value).map(MinFree::Bytes),
            },
        },
        _ => size(value).map(MinFree::Bytes),
    };
    parsed.ok_or_else(|| {
        "a share below 1 like \"5%\" or 0.05, a size like \"50GB\", or a number of bytes".to_owned()
    })
}

/// Reads the permission bits of files: octal digits, as text or as YAML makes numbers of them.
pub(super) fn file_mode(value: &Value) -> Parsed<FileMode> {
    let mode = match value {
        Value::Number(number) => number
            .as_u64()
            .or_else(|| exact(number.as_f64()?))
            .and_then(FileMode::from_number),
        Value::String(text) => FileMode::parse(text),
        _ => None,
    };
    mode.ok_or_else(|| {
        "\"0600\", \"0640\", \"0660\", \"0644\" or \"0664\": files that their owner can read and \
         write, others no more than the group, and nobody else can write"
            .to_owned()
    })
}

/// Reads a list of directories: text with commas, or a list of texts.
pub(super) fn paths(value: &Value) -> Parsed<Vec<PathBuf>> {
    let paths: Option<Vec<PathBuf>> = match value {
        Value::String(text) => Some(text.split(',').filter_map(path).collect()),
        Value::Array(items) => items
            .iter()
            .filter(|item| !is_unset(item))
            .map(|item| path(item.as_str()?))
            .collect(),
        _ => None,
    };
    let paths =
        paths.ok_or("an absolute directory, several separated by commas, or a list of them")?;
    match check_paths(&paths) {
        Ok(()) => Ok(paths),
        // One path of several is at fault: the whole value alone would not say which.
        Err((path, expected)) if paths.len() > 1 => Err(format!("{expected}, got {path}")),
        Err((_, expected)) => Err(expected),
    }
}

/// Reads one directory.
pub(super) fn directory(value: &Value) -> Parsed<PathBuf> {
    let path = value.as_str().and_then(path);
    let path = path.ok_or("an absolute directory")?;
    check_path(&path).map(|()| path)
}

/// Reads the weights of directories: a word, or numbers.
pub(super) fn weights(value: &Value) -> Parsed<PathWeights> {
    if is_word(value, "measured") {
        return Ok(PathWeights::Measured);
    }
    if is_word(value, "equal") {
        return Ok(PathWeights::Equal);
    }
    let weight = |item: &Value| number(item, &PATH_WEIGHT, "").ok();
    let text = |item: &str| weight(&Value::String(item.to_owned()));
    let list: Option<Vec<f64>> = match value {
        Value::Array(items) => items.iter().map(weight).collect(),
        Value::String(items) => items.split(',').map(text).collect(),
        // One path has one weight, though it changes nothing.
        one => weight(one).map(|weight| vec![weight]),
    };
    list.map(PathWeights::Listed).ok_or_else(|| {
        let (least, most) = (PATH_WEIGHT.start(), PATH_WEIGHT.end());
        format!("measured, equal, or a number from {least} to {most} for each path of gds_path")
    })
}

/// Reads one of a few words.
pub(super) fn word<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Parsed<T> {
    if let Some((_, choice)) = choices.iter().find(|(name, _)| is_word(value, name)) {
        return Ok(*choice);
    }
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    Err(names.join(" or "))
}

/// Says what sort of value it is.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

/// Says a range of whole numbers in words.
pub(super) fn span(range: &RangeInclusive<u64>) -> String {
    match range.end() {
        &u64::MAX => format!("a whole number, {} or more", range.start()),
        end => format!("a whole number from {} to {end}", range.start()),
    }
}

fn is_word(value: &Value, word: &str) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.trim().eq_ignore_ascii_case(word))
}

fn path(text: &str) -> Option<PathBuf> {
    Some(text.trim())
        .filter(|text| !text.is_empty())
        .map(PathBuf::from)
}

fn share(number: f64) -> Option<MinFree> {
    (0.0..1.0)
        .contains(&number)
        .then_some(MinFree::Share(number))
}

/// Reads digits with at most one decimal point: no sign, no exponent, no `inf`.
fn decimal(text: &str) -> Option<f64> {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    if plain { text.parse().ok() } else { None }
}

/// Turns a double into the whole number it stands for, where it stands for one exactly.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the number is whole and between 0 and 2^53"
)]
fn exact(number: f64) -> Option<u64> {
    let fits = number.fract() == 0.0 && (0.0..=EXACT_DOUBLE).contains(&number);
    fits.then_some(number as u64)
}

/// Reads a number of bytes, or text with a unit: `"500GB"` is decimal, `"500GiB"` binary.
pub fn size(value: &Value) -> Option<u64> {
    let text = match value {
        Value::Number(number) => return number.as_u64().or_else(|| exact(number.as_f64()?)),
        Value::String(text) => text.trim(),
        _ => return None,
    };
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit = unit.trim().to_ascii_lowercase();
    let (_, bytes) = UNITS.iter().find(|(name, _)| *name == unit)?;
    if let Ok(count) = digits.parse::<u64>() {
        return count.checked_mul(*bytes);
    }
    // A fraction of a unit rounds to whole bytes; beyond 2^53 bytes (8 PiB) it is refused.
    #[expect(clippy::cast_precision_loss, reason = "every unit is below 2^53")]
    let product = decimal(digits)? * (*bytes as f64);
    exact(product.round())
}
