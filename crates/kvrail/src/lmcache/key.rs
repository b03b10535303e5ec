//! What a file name says: the key of a chunk, or of one layer of one.

use std::fmt;

use super::element::Element;
use crate::error::{Error, ErrorKind, Result};

/// What stands between the parts of a key, so that no part can hold it.
const SEPARATOR: char = '@';
/// What stands between the name and the value of a tag.
const TAG_SEPARATOR: char = '%';
/// Bytes of a key: a file name has 255, and quoting makes none shorter.
const KEY_BYTES_MAX: usize = 255;
/// Parts that every key has.
const PARTS: usize = 5;

/// The hash of a chunk's tokens and all before them: a whole number of 64 bits.
///
/// Whether it has a sign depends on the algorithm: Python's own `hash` gives numbers from -2^63 to
/// 2^63 - 1, the others from 0 to 2^64 - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkHash(i128);

/// The key of a chunk in LMCache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LmcacheKey {
    /// The model's name, as vLLM was given it.
    pub model: String,
    /// Workers of the instance; 1 where all have the same bytes.
    pub world_size: u32,
    /// Which of them.
    pub worker: u32,
    /// The hash of the tokens.
    pub hash: ChunkHash,
    /// The type of the KV cache's elements.
    pub element: Element,
    /// The layer, where each has a file of its own.
    pub layer: Option<u32>,
    /// What requests were tagged with, in their order.
    pub tags: Vec<(String, String)>,
}

impl ChunkHash {
    /// Makes a hash of a number.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a number that neither 64 bits with a sign nor 64 without
    /// one can hold.
    pub fn new(number: i128) -> Result<Self> {
        if (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&number) {
            return Ok(Self(number));
        }
        let message = format!("chunk hash {number}: expected a number of 64 bits");
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Returns the hash of 64 bits, which are those of a number with a sign or without one.
    pub fn from_bits(bits: u64, has_sign: bool) -> Self {
        match has_sign {
            true => Self(i128::from(bits.cast_signed())),
            false => Self(i128::from(bits)),
        }
    }

    /// Returns the number.
    pub fn number(self) -> i128 {
        self.0
    }

    /// Returns the number's 64 bits, `None` where it has no place among the numbers with a sign, or
    /// without one.
    pub fn bits(self, has_sign: bool) -> Option<u64> {
        match has_sign {
            true => i64::try_from(self.0).ok().map(i64::cast_unsigned),
            false => u64::try_from(self.0).ok(),
        }
    }

    /// Returns the number in decimal, which decides about the folder.
    pub fn decimal(self) -> String {
        self.0.to_string()
    }

    /// Reads the hexadecimal form that keys have.
    fn parse(text: &str) -> Option<Self> {
        let number = i128::from_str_radix(text, 16).ok()?;
        let hash = Self::new(number).ok()?;
        (hash.to_string() == text).then_some(hash)
    }
}

impl fmt::Display for ChunkHash {
    /// Writes the hexadecimal form of keys: a sign where it is negative, and the magnitude.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        write!(out, "{sign}{:x}", self.0.unsigned_abs())
    }
}

impl LmcacheKey {
    /// Reads the text of a key.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any text that [`LmcacheKey`] does not write itself.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |what: &str| {
            let shown: String = text.chars().take(KEY_BYTES_MAX).collect();
            let message = format!("LMCache key `{}`: {what}", shown.escape_debug());
            Error::new(ErrorKind::InvalidArgument, message)
        };
        let parts: Vec<&str> = text.split(SEPARATOR).collect();
        let Some((&[model, world_size, worker, hash, element], mut rest)) =
            parts.split_first_chunk::<PARTS>()
        else {
            return Err(invalid("expected model@workers@worker@hash@type"));
        };
        let mut layer = None;
        if let [first, after @ ..] = rest
            && let Some(number) = number(first)
        {
            layer = Some(number);
            rest = after;
        }
        let tags = rest.iter().map(|tag| {
            let (name, value) = tag.split_once(TAG_SEPARATOR)?;
            Some((name.to_owned(), value.to_owned()))
        });
        let key = Self {
            model: model.to_owned(),
            world_size: number(world_size).ok_or_else(|| invalid("no number of workers"))?,
            worker: number(worker).ok_or_else(|| invalid("no number of a worker"))?,
            hash: ChunkHash::parse(hash).ok_or_else(|| invalid("no hash of 64 bits"))?,
            element: Element::of_key(element).ok_or_else(|| invalid("no type of elements"))?,
            layer,
            tags: tags
                .collect::<Option<_>>()
                .ok_or_else(|| invalid("no tag of the form name%value"))?,
        };
        key.check()?;
        Ok(key)
    }

    /// Checks that the key's text can be read back.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a model's name or a tag with a `@`, a tag's name with a
    /// `%`, a type that no KV cache has, and a key that is longer than a file name.
    pub fn check(&self) -> Result<()> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        let values = self.tags.iter().flat_map(|(name, value)| [name, value]);
        for part in std::iter::once(&self.model).chain(values) {
            if part.contains(SEPARATOR) {
                let part = part.escape_debug();
                return invalid(format!("LMCache key: `{part}` has a `{SEPARATOR}`"));
            }
        }
        if let Some((name, _)) = self
            .tags
            .iter()
            .find(|(name, _)| name.contains(TAG_SEPARATOR))
        {
            let name = name.escape_debug();
            return invalid(format!("LMCache key: tag `{name}` has a `{TAG_SEPARATOR}`"));
        }
        if self.element.key_name().is_none() {
            let name = self.element.head_name();
            return invalid(format!(
                "LMCache key: no KV cache has elements of type {name}"
            ));
        }
        let bytes = self.to_string().len();
        if bytes > KEY_BYTES_MAX {
            return invalid(format!(
                "LMCache key of {bytes} bytes: a file name has at most {KEY_BYTES_MAX}"
            ));
        }
        Ok(())
    }
}

impl fmt::Display for LmcacheKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let element = self.element.key_name().unwrap_or_default();
        write!(
            out,
            "{}@{}@{}@{}@{element}",
            self.model, self.world_size, self.worker, self.hash
        )?;
        if let Some(layer) = self.layer {
            write!(out, "@{layer}")?;
        }
        for (name, value) in &self.tags {
            write!(out, "@{name}{TAG_SEPARATOR}{value}")?;
        }
        Ok(())
    }
}

/// Reads a number in the one spelling that it is written with.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Keys of all kinds, some of which are too long for a file name.
    pub(in super::super) fn arbitrary_key() -> impl Strategy<Value = LmcacheKey> {
        let named: Vec<Element> = Element::all()
            .filter(|element| element.key_name().is_some())
            .collect();
        let hash = prop_oneof![
            any::<i64>().prop_map(i128::from),
            any::<u64>().prop_map(i128::from)
        ];
        let tag = ("[^@%]{0,6}", "[^@]{0,6}");
        (
            "[^@]{0,30}",
            any::<u32>(),
            any::<u32>(),
            hash,
            proptest::sample::select(named),
            proptest::option::of(any::<u32>()),
            proptest::collection::vec(tag, 0..3),
        )
            .prop_map(|(model, world_size, worker, hash, element, layer, tags)| {
                LmcacheKey {
                    model,
                    world_size,
                    worker,
                    hash: ChunkHash::new(hash).unwrap(),
                    element,
                    layer,
                    tags,
                }
            })
    }

    proptest! {
        #[test]
        fn keys_come_back(key in arbitrary_key()) {
            match key.check() {
                Ok(()) => prop_assert_eq!(LmcacheKey::parse(&key.to_string()).unwrap(), key),
                Err(_) => prop_assert!(key.to_string().len() > KEY_BYTES_MAX),
            }
        }

        #[test]
        fn a_key_has_one_spelling(text in "m@[+0-9]{1,2}@[0-9]@-?[0-9a-fA-F_]{1,17}@(half|bool)(@[0-9a%]{1,3}){0,2}") {
            if let Ok(key) = LmcacheKey::parse(&text) {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn hashes_keep_their_bits(bits in any::<u64>(), has_sign in any::<bool>()) {
            let hash = ChunkHash::from_bits(bits, has_sign);
            prop_assert_eq!(hash.bits(has_sign), Some(bits));
            prop_assert_eq!(ChunkHash::parse(&hash.to_string()), Some(hash));
            let fits_both = bits >> 63 == 0;
            prop_assert_eq!(hash.bits(!has_sign).is_some(), fits_both);
        }
    }

    #[test]
    fn keys_are_written_as_lmcache_writes_them() {
        let mut key = LmcacheKey::parse("meta-llama/Llama-3.1-8B@8@3@-1f00@bfloat16").unwrap();
        assert_eq!(key.model, "meta-llama/Llama-3.1-8B");
        assert_eq!((key.world_size, key.worker), (8, 3));
        assert_eq!(key.hash.decimal(), "-7936");
        key.layer = Some(2);
        key.tags = vec![("user".into(), "50%".into())];
        let text = "meta-llama/Llama-3.1-8B@8@3@-1f00@bfloat16@2@user%50%";
        assert_eq!(key.to_string(), text);
        assert_eq!(LmcacheKey::parse(text).unwrap(), key);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "m@1@0@1",
            "m@1@0@0x1@half",
            "m@01@0@1@half",
            "m@1@0@01@half",
            "m@1@0@-0@half",
            "m@1@0@A@half",
            "m@1@0@10000000000000000@half",
            "m@1@0@-8000000000000001@half",
            "m@1@0@1@bool",
            "m@1@0@1@half@tag",
        ] {
            assert!(LmcacheKey::parse(text).is_err(), "{text}");
        }
        let long = format!("{}@1@0@1@half", "m".repeat(300));
        assert!(LmcacheKey::parse(&long).is_err());
    }
}
