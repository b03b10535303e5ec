//! Which part of a chunk one file holds.

use std::fmt;
use std::hash::{Hash, Hasher};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};

/// A contiguous range of KV heads, counted over all ranks; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeadRange {
    first: u16,
    end: u16,
}

/// The part of a chunk that one file holds, and the name that it has.
///
/// All that one rank has, whatever that is: a number. Or, where a block's bytes have heads
/// outermost inside each layer, a range of heads: then ranks of instances of any tensor-parallel
/// size can use it, and the number is that of the pipeline stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    rank: u32,
    heads: Option<HeadRange>,
}

impl HeadRange {
    /// Makes the range of the heads from `first` to the one before `end`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for an empty range.
    pub fn new(first: u16, end: u16) -> Result<Self> {
        if first < end {
            return Ok(Self { first, end });
        }
        let message = format!("heads {first}-{end}: expected at least one");
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Returns the first head.
    pub fn first(self) -> usize {
        self.first.into()
    }

    /// Returns the head behind the last.
    pub fn end(self) -> usize {
        self.end.into()
    }

    /// Returns the number of heads.
    pub fn count(self) -> usize {
        self.end().saturating_sub(self.first())
    }

    /// Returns the heads that both have, `None` where there are none.
    #[must_use]
    pub fn common(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.end.min(other.end)).ok()
    }
}

impl Part {
    /// Makes the part of the heads `heads` in pipeline stage `stage`.
    pub fn of_heads(stage: u32, heads: HeadRange) -> Self {
        Self {
            rank: stage,
            heads: Some(heads),
        }
    }

    /// Returns the number: of a rank, or of the stage that the heads belong to.
    pub fn rank(self) -> u32 {
        self.rank
    }

    /// Returns the heads, `None` for all that a rank has.
    pub fn heads(self) -> Option<HeadRange> {
        self.heads
    }

    /// Returns the number that decides about the path where paths are given out by GPU: of the
    /// rank, or of the part among the equal ones that heads are split into.
    pub fn number(self) -> usize {
        let among = self.heads.map_or(0, |heads| heads.first() / heads.count());
        self.rank as usize + among
    }

    /// Reads the name of a part; any other spelling is none.
    pub fn parse(text: &str) -> Option<Self> {
        let part = match text.split_once('h') {
            None => Self::from(text.parse::<u32>().ok()?),
            Some((stage, heads)) => {
                let (first, end) = heads.split_once('-')?;
                let heads = HeadRange::new(first.parse().ok()?, end.parse().ok()?).ok()?;
                Self::of_heads(stage.parse().ok()?, heads)
            }
        };
        (part.to_string() == text).then_some(part)
    }
}

impl From<u32> for Part {
    fn from(rank: u32) -> Self {
        Self { rank, heads: None }
    }
}

impl PartialEq<u32> for Part {
    fn eq(&self, rank: &u32) -> bool {
        *self == Self::from(*rank)
    }
}

/// As one number: what is known of chunks is kept in tables, and a lookup asks for hundreds.
impl Hash for Part {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let (first, end) = self.heads.map_or((0, 0), |heads| (heads.first, heads.end));
        let heads = u64::from(first) << 48 | u64::from(end) << 32;
        state.write_u64(heads | u64::from(self.rank));
    }
}

impl fmt::Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.rank)?;
        match self.heads {
            Some(HeadRange { first, end }) => write!(out, "h{first}-{end}"),
            None => Ok(()),
        }
    }
}

/// A number for a rank, else the name.
impl Serialize for Part {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self.heads {
            None => out.serialize_u32(self.rank),
            Some(_) => out.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Rank(u32),
            Name(String),
        }
        match Written::deserialize(input)? {
            Written::Rank(rank) => Ok(rank.into()),
            Written::Name(name) => Self::parse(&name)
                .filter(|part| part.heads.is_some())
                .ok_or_else(|| D::Error::custom("expected a rank or <stage>h<first>-<end>")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_part_has_one_spelling(name in "[0-9+]{1,3}h?[0-9]{0,6}-?[0-9]{0,3}|.{0,12}") {
            if let Some(part) = Part::parse(&name) {
                prop_assert_eq!(part.to_string(), name);
            }
        }

        #[test]
        fn parts_round_trip(rank in any::<u32>(), first in 0_u16..100, count in 0_u16..100) {
            let part = match HeadRange::new(first, first + count) {
                Ok(heads) => Part::of_heads(rank, heads),
                Err(_) => rank.into(),
            };
            prop_assert_eq!(Part::parse(&part.to_string()), Some(part));
            let json = serde_json::to_string(&part).unwrap();
            prop_assert_eq!(serde_json::from_str::<Part>(&json).unwrap(), part);
        }
    }

    #[test]
    fn a_rank_is_a_number_and_equal_parts_are_counted() {
        assert_eq!(serde_json::to_string(&Part::from(3)).unwrap(), "3");
        let heads = |first, end| Part::of_heads(1, HeadRange::new(first, end).unwrap());
        assert_eq!(serde_json::to_string(&heads(4, 8)).unwrap(), "\"1h4-8\"");
        assert!(serde_json::from_str::<Part>("\"3\"").is_err());
        assert_eq!([heads(0, 4), heads(4, 8)].map(Part::number), [1, 2]);
        assert!(HeadRange::new(4, 4).is_err());
        assert!(Part::parse("0h4-4").is_none() && Part::parse("00").is_none());
    }
}
