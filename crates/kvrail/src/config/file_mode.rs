//! Who besides the owner may read and write what kvrail creates.

use std::fmt;

/// Permission bits of new files: one of 0600, 0640, 0660, 0644 and 0664.
///
/// Folders get the same bits and the right to enter for whoever may read. The owner can always
/// read and write; the group at most that, all others at most read, and neither more than those
/// before them. World-writable is none of them: whoever can write to a store can replace KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileMode(u32);

/// All that make sense.
const MODES: [u32; 5] = [0o600, 0o640, 0o660, 0o644, 0o664];

impl Default for FileMode {
    /// The owner only: 0600.
    fn default() -> Self {
        Self(0o600)
    }
}

impl FileMode {
    /// Makes a mode from its bits; `None` unless it is one of the five.
    pub fn from_bits(bits: u32) -> Option<Self> {
        MODES.contains(&bits).then_some(Self(bits))
    }

    /// Returns the bits of files, such as `0o640`.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Reads octal digits, with or without `0` or `0o` in front.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let plain =
            (3..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        let bits = plain.then(|| u32::from_str_radix(digits, 8).ok())?;
        Self::from_bits(bits?)
    }

    /// Reads a number. YAML without quotes gives 640 or 416 for 0640; no mode is both.
    pub(super) fn from_number(number: u64) -> Option<Self> {
        let bits = u32::try_from(number).ok()?;
        Self::parse(&bits.to_string()).or_else(|| Self::from_bits(bits))
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:04o}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_modes_are_taken_in_every_spelling_and_no_others() {
        let mut taken = Vec::new();
        for bits in 0..0o10_000_u32 {
            let parsed = FileMode::parse(&format!("{bits:04o}"));
            assert_eq!(parsed, FileMode::from_bits(bits));
            let Some(mode) = parsed else { continue };
            taken.push(bits);
            for text in [
                format!("{bits:o}"),
                format!("0o{bits:o}"),
                format!(" {bits:04o} "),
            ] {
                assert_eq!(FileMode::parse(&text), Some(mode), "{text}");
            }
            let digits = format!("{bits:o}").parse().unwrap();
            assert_eq!(FileMode::from_number(digits), Some(mode));
            assert_eq!(FileMode::from_number(bits.into()), Some(mode));
        }
        assert_eq!(taken, [0o600, 0o640, 0o644, 0o660, 0o664]);
        for text in [
            "",
            "0666",
            "rw-r-----",
            "-640",
            "00000640",
            "0o",
            "6 40",
            "0x1a0",
            "640.0",
        ] {
            assert_eq!(FileMode::parse(text), None, "{text}");
        }
        assert_eq!(FileMode::from_number(u64::MAX), None);
    }
}
