//! Payloads of several ranges of heads: which bytes of one are which of another.
//!
//! Where a layer's block has heads outermost, the bytes of a head are one run of it, and those of
//! any range of heads are, too. So a payload of some heads can be put together from payloads of
//! others: for each block, for each layer, one piece.

use std::ops::Range;

use super::kv_layout::KvLayout;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of one head in a block of each layer, in payload order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadBytes {
    layers: Vec<usize>,
    sum: usize,
}

/// A run of bytes that two payloads have in common; offsets count from the block's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadPiece {
    /// Where it is in the payload that is read.
    pub source: usize,
    /// Where it is in the payload that is put together.
    pub target: usize,
    /// Its length.
    pub bytes: usize,
}

impl HeadBytes {
    /// Divides the blocks of a layout among its `heads` heads.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when a layer's block is no multiple of the number of heads.
    pub fn new(layout: &KvLayout, heads: usize) -> Result<Self> {
        let mut layers = Vec::with_capacity(layout.layer_count());
        for (index, layer) in layout.layers().iter().enumerate() {
            match layer.block_bytes.checked_div(heads) {
                Some(bytes) if bytes * heads == layer.block_bytes => layers.push(bytes),
                _ => {
                    let bytes = layer.block_bytes;
                    let message = format!("layer {index}: blocks of {bytes} bytes, {heads} heads");
                    return Err(Error::new(ErrorKind::InvalidArgument, message));
                }
            }
        }
        let sum = layers.iter().sum();
        Ok(Self { layers, sum })
    }

    /// Returns the bytes of one block of `heads` heads over all layers.
    pub fn block_bytes(&self, heads: usize) -> usize {
        self.sum.saturating_mul(heads)
    }

    /// Returns the shape of a payload of `blocks` blocks with `heads` heads, as
    /// [`KvLayout::payload_shape`] has it. What does not fit into a number is as large as can be.
    pub fn payload_shape(&self, blocks: usize, heads: usize) -> [usize; 3] {
        let first = self.layers.first().copied().unwrap_or_default();
        if self.layers.iter().all(|bytes| *bytes == first) {
            [blocks, self.layers.len(), first.saturating_mul(heads)]
        } else {
            [blocks, 1, self.sum.saturating_mul(heads)]
        }
    }

    /// Returns the pieces of one block that carry the heads `wanted` from a payload of the heads
    /// `source` to one of the heads `target`, in payload order. Both must have them.
    pub fn pieces(
        &self,
        source: &Range<usize>,
        target: &Range<usize>,
        wanted: &Range<usize>,
    ) -> Vec<HeadPiece> {
        let (mut from, mut to) = (0, 0);
        let piece = |bytes: &usize| {
            let piece = HeadPiece {
                source: from + wanted.start.saturating_sub(source.start) * bytes,
                target: to + wanted.start.saturating_sub(target.start) * bytes,
                bytes: wanted.len() * bytes,
            };
            from += source.len() * bytes;
            to += target.len() * bytes;
            piece
        };
        self.layers.iter().map(piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::LayerSpan;
    use super::*;

    fn layout(blocks: &[usize]) -> KvLayout {
        let mut offset = 0;
        let layers = blocks.iter().map(|&block_bytes| {
            let span = LayerSpan {
                region: 0,
                offset,
                block_stride: block_bytes,
                block_bytes,
            };
            offset += block_bytes;
            span
        });
        KvLayout::new(layers.collect(), 1, &[blocks.iter().sum()]).unwrap()
    }

    proptest! {
        /// One block of all heads, cut into two payloads and put together again.
        #[test]
        fn pieces_are_the_same_bytes(
            bytes in proptest::collection::vec(1_usize..9, 1..5),
            heads in 2_usize..9, cut in any::<prop::sample::Index>(),
        ) {
            let cut = 1 + cut.index(heads - 1);
            let whole: Vec<usize> = bytes.iter().map(|bytes| bytes * heads).collect();
            let head_bytes = HeadBytes::new(&layout(&whole), heads).unwrap();
            let payload: Vec<usize> = (0..whole.iter().sum()).collect();
            let mut again = vec![usize::MAX; payload.len()];
            for part in [0..cut, cut..heads] {
                let mut half = vec![usize::MAX; payload.len() / heads * part.len()];
                for piece in head_bytes.pieces(&(0..heads), &part, &part) {
                    half[piece.target..piece.target + piece.bytes]
                        .copy_from_slice(&payload[piece.source..piece.source + piece.bytes]);
                }
                prop_assert!(!half.contains(&usize::MAX), "every byte of it");
                for piece in head_bytes.pieces(&part, &(0..heads), &part) {
                    again[piece.target..piece.target + piece.bytes]
                        .copy_from_slice(&half[piece.source..piece.source + piece.bytes]);
                }
            }
            prop_assert_eq!(again, payload);
        }
    }

    #[test]
    fn blocks_are_divided_among_heads_or_refused() {
        let even = layout(&[8, 8]);
        assert_eq!(
            HeadBytes::new(&even, 2).unwrap().payload_shape(3, 4),
            [3, 2, 16]
        );
        let odd = layout(&[8, 4]);
        assert_eq!(
            HeadBytes::new(&odd, 2).unwrap().payload_shape(3, 1),
            [3, 1, 6]
        );
        assert!(HeadBytes::new(&even, 3).is_err());
        assert!(HeadBytes::new(&even, 0).is_err());
    }
}
