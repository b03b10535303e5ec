//! The part of a chunk that one file holds.

use kvrail::{HeadRange, Part};
use pyo3::prelude::*;

/// A rank, or a pipeline stage with its first head and the one behind its last.
#[derive(Debug, Clone, Copy, FromPyObject)]
pub(crate) enum PartArgument {
    #[pyo3(transparent)]
    Rank(u32),
    #[pyo3(transparent)]
    Heads((u32, u16, u16)),
}

impl PartArgument {
    /// Returns the part.
    ///
    /// # Errors
    /// [`InvalidArgument`](kvrail::ErrorKind::InvalidArgument) for an empty range of heads.
    pub(crate) fn part(self) -> kvrail::Result<Part> {
        match self {
            Self::Rank(rank) => Ok(rank.into()),
            Self::Heads((stage, first, end)) => {
                Ok(Part::of_heads(stage, HeadRange::new(first, end)?))
            }
        }
    }
}
