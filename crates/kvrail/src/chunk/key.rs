//! The identity of a chunk's content.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// The most bytes a key can have: a SHA-256 block hash.
const KEY_BYTES_MAX: usize = 32;
/// The fewest: below 64 bits two prompts would collide in practice.
const KEY_BYTES_MIN: usize = 8;

/// Identity of a chunk's content: the serving engine's chained hash of the chunk's last block.
///
/// The hash is chained, so it stands for all tokens from the start of the prompt to the end of
/// the chunk. 8 to 32 bytes; displayed as lower-case hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    bytes: [u8; KEY_BYTES_MAX],
    length: u8,
}

/// A chunk and the one before it in its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// The chunk.
    pub key: ChunkKey,
    /// The chunk before it, `None` for the first chunk of a prompt.
    pub parent: Option<ChunkKey>,
}

impl ChunkKey {
    /// Makes a key from the bytes of a block hash.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless there are 8 to 32 bytes.
    pub fn from_bytes(hash: &[u8]) -> Result<Self> {
        let mut bytes = [0; KEY_BYTES_MAX];
        match (bytes.get_mut(..hash.len()), u8::try_from(hash.len())) {
            (Some(target), Ok(length)) if hash.len() >= KEY_BYTES_MIN => {
                target.copy_from_slice(hash);
                Ok(Self { bytes, length })
            }
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "chunk key of {} bytes: expected {KEY_BYTES_MIN} to {KEY_BYTES_MAX}",
                    hash.len()
                ),
            )),
        }
    }

    /// Reads a key from lower-case hex, the form it has in file names.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any other text: two spellings of one key must not exist.
    pub fn from_hex(text: &str) -> Result<Self> {
        let invalid = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "chunk key `{}`: expected lower-case hex",
                    text.escape_debug()
                ),
            )
        };
        if !text.len().is_multiple_of(2) || text.len() > 2 * KEY_BYTES_MAX {
            return Err(invalid());
        }
        let mut bytes = Vec::with_capacity(KEY_BYTES_MAX);
        for pair in text.as_bytes().chunks_exact(2) {
            let [high, low] = pair else {
                return Err(invalid());
            };
            let (Some(high), Some(low)) = (hex_digit(*high), hex_digit(*low)) else {
                return Err(invalid());
            };
            bytes.push(high << 4 | low);
        }
        Self::from_bytes(&bytes)
    }

    /// Returns the bytes of the hash.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes
            .get(..usize::from(self.length))
            .unwrap_or_default()
    }
}

/// Returns the lower-case hex digit of a value below 16.
fn digit(value: u8) -> u8 {
    match value {
        0..10 => b'0' + value,
        _ => b'a' + value - 10,
    }
}

/// Returns the value of a lower-case hex digit.
fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for ChunkKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Written at once: formatting digit by digit costs as much as looking a file up.
        let mut digits = [0; 2 * KEY_BYTES_MAX];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.as_bytes()) {
            pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        let text = digits.get(..2 * usize::from(self.length));
        out.write_str(std::str::from_utf8(text.unwrap_or_default()).unwrap_or_default())
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ChunkKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hex_round_trips(hash in proptest::collection::vec(any::<u8>(), 8..=32)) {
            let key = ChunkKey::from_bytes(&hash).unwrap();
            prop_assert_eq!(key.as_bytes(), &hash[..]);
            prop_assert_eq!(ChunkKey::from_hex(&key.to_string()).unwrap(), key);
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,80}") {
            if let Ok(key) = ChunkKey::from_hex(&text) {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn short_and_long_hashes_are_refused() {
        assert!(ChunkKey::from_bytes(&[1; 7]).is_err());
        assert!(ChunkKey::from_bytes(&[1; 33]).is_err());
        assert!(ChunkKey::from_hex(&"AB".repeat(16)).is_err());
    }
}
