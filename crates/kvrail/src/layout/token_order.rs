//! The order of KV inside a block, for formats that go by tokens rather than by blocks.
//!
//! A payload of kvrail's holds blocks as they lie in memory. Others hold, for each side (K, then V),
//! for each layer, for each token, all heads one after the other. The two are the same elements in
//! another order: an affine one, so that a side of a block is an offset and three strides.

use crate::error::{Error, ErrorKind, Result};

/// The largest block that is accepted: 1 GiB, far above any real one.
const BLOCK_BYTES_MAX: usize = 1 << 30;

/// Where the elements of one side of a block lie, in bytes from the start of the layer's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SideOrder {
    /// The first element of the first head of the first token.
    pub offset: usize,
    /// From one head to the next.
    pub head_stride: usize,
    /// From one token to the next.
    pub token_stride: usize,
    /// From one element of a head to the next.
    pub element_stride: usize,
}

/// Sizes of the KV of one layer's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenShape {
    /// Layers of the payload.
    pub layers: usize,
    /// Tokens of a block.
    pub tokens: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Elements of a head.
    pub head_size: usize,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: usize,
}

/// The order of KV inside the blocks of a group, the same for all its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenOrder {
    shape: TokenShape,
    sides: Vec<SideOrder>,
}

/// Which way elements go.
enum Way<'a> {
    /// From blocks to tokens.
    ToTokens(&'a [u8], &'a mut [u8]),
    /// From tokens to blocks.
    ToBlocks(&'a [u8], &'a mut [u8]),
}

impl TokenOrder {
    /// Makes the order of blocks with `sides`: K and V, or one for both.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless every byte of a block belongs to exactly one element.
    pub fn new(shape: TokenShape, sides: Vec<SideOrder>) -> Result<Self> {
        let order = Self { shape, sides };
        let invalid = |message: &str| {
            let message = format!("order of KV in a block, {:?}: {message}", order.shape);
            Error::new(ErrorKind::InvalidArgument, message)
        };
        if !matches!(shape.element_bytes, 1 | 2 | 4 | 8) || shape.layers == 0 {
            return Err(invalid(
                "expected elements of 1, 2, 4 or 8 bytes, and layers",
            ));
        }
        let block_bytes = [
            shape.tokens,
            shape.heads,
            shape.head_size,
            shape.element_bytes,
        ]
        .iter()
        .try_fold(order.sides.len(), |product, side| {
            product.checked_mul(*side)
        })
        .filter(|bytes| (1..=BLOCK_BYTES_MAX).contains(bytes))
        .ok_or_else(|| invalid("expected blocks of 1 byte to 1 GiB"))?;
        // As many elements as there is room for, each in the block and at a place of its own: then
        // none is left out.
        let mut taken = vec![false; block_bytes / shape.element_bytes];
        for at in order.elements() {
            let place = at
                .filter(|at| at.is_multiple_of(shape.element_bytes))
                .and_then(|at| taken.get_mut(at / shape.element_bytes))
                .ok_or_else(|| invalid("an element lies outside of the block"))?;
            if std::mem::replace(place, true) {
                return Err(invalid("two elements lie at one place"));
            }
        }
        Ok(order)
    }

    /// Returns the sizes.
    pub fn shape(&self) -> TokenShape {
        self.shape
    }

    /// Returns the sides: 2 for K and V, 1 where both are one.
    pub fn side_count(&self) -> usize {
        self.sides.len()
    }

    /// Returns the bytes of one layer's block.
    pub fn block_bytes(&self) -> usize {
        self.sides.len() * self.shape.tokens * self.token_bytes()
    }

    /// Returns the bytes of `blocks` blocks over all layers.
    pub fn payload_bytes(&self, blocks: usize) -> usize {
        blocks * self.shape.layers * self.block_bytes()
    }

    /// Returns the shape of a payload by tokens: sides, layers, tokens, elements of all heads.
    pub fn token_payload_shape(&self, blocks: usize) -> [usize; 4] {
        let shape = &self.shape;
        let tokens = blocks * shape.tokens;
        [
            self.sides.len(),
            shape.layers,
            tokens,
            shape.heads * shape.head_size,
        ]
    }

    /// Writes the payload by tokens of whole blocks: `blocks` holds, for each block, for each layer,
    /// that layer's block.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless both have the bytes of the same number of blocks.
    pub fn to_tokens(&self, blocks: &[u8], tokens: &mut [u8]) -> Result<()> {
        let count = self.block_count(tokens.len(), blocks.len())?;
        self.copy_all(Way::ToTokens(blocks, tokens), count, 0)
    }

    /// Writes the blocks from `first_block` on of a payload by tokens.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless `tokens` has whole blocks, and `blocks` as many as there
    /// are from `first_block` on.
    pub fn to_blocks(&self, tokens: &[u8], first_block: usize, blocks: &mut [u8]) -> Result<()> {
        let left_out = self.payload_bytes(first_block);
        let count = self.block_count(tokens.len(), blocks.len() + left_out)?;
        self.copy_all(Way::ToBlocks(tokens, blocks), count, first_block)
    }

    fn token_bytes(&self) -> usize {
        self.shape.heads * self.shape.head_size * self.shape.element_bytes
    }

    fn block_count(&self, token_payload: usize, block_payload: usize) -> Result<usize> {
        let one = self.payload_bytes(1);
        if token_payload == block_payload && token_payload.is_multiple_of(one) {
            return Ok(token_payload / one);
        }
        let message = format!(
            "{token_payload} bytes by tokens, {block_payload} by blocks: expected the same multiple of {one}"
        );
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Returns where each element of a block lies; `None` on overflow.
    fn elements(&self) -> impl Iterator<Item = Option<usize>> {
        let shape = self.shape;
        self.sides.iter().flat_map(move |side| {
            (0..shape.heads).flat_map(move |head| {
                (0..shape.tokens).flat_map(move |token| {
                    (0..shape.head_size).map(move |element| {
                        let head = head.checked_mul(side.head_stride)?;
                        let token = token.checked_mul(side.token_stride)?;
                        let element = element.checked_mul(side.element_stride)?;
                        head.checked_add(token)?
                            .checked_add(element)?
                            .checked_add(side.offset)
                    })
                })
            })
        })
    }

    /// Moves blocks from `first` to `count`, each element once.
    fn copy_all(&self, mut way: Way<'_>, count: usize, first: usize) -> Result<()> {
        let shape = self.shape;
        let run = shape.head_size * shape.element_bytes;
        let row = self.token_bytes();
        for (index, side) in self.sides.iter().enumerate() {
            for layer in 0..shape.layers {
                let plane = (index * shape.layers + layer) * count * shape.tokens * row;
                for block in first..count {
                    let base = ((block - first) * shape.layers + layer) * self.block_bytes();
                    for token in 0..shape.tokens {
                        let by_token = plane + (block * shape.tokens + token) * row;
                        for head in 0..shape.heads {
                            let from = base
                                + side.offset
                                + head * side.head_stride
                                + token * side.token_stride;
                            way.copy_head(from, by_token + head * run, side, shape)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Way<'_> {
    /// Moves one head of one token: at `block` among the blocks, at `token` by tokens.
    fn copy_head(
        &mut self,
        block: usize,
        token: usize,
        side: &SideOrder,
        shape: TokenShape,
    ) -> Result<()> {
        let run = shape.head_size * shape.element_bytes;
        let stride = side.element_stride;
        let span = (shape.head_size - 1) * stride + shape.element_bytes;
        let (blocks, tokens) = (block..block + span, token..token + run);
        match self {
            Self::ToTokens(from, to) => {
                let from = from.get(blocks).ok_or_else(outside)?;
                let to = to.get_mut(tokens).ok_or_else(outside)?;
                match shape.element_bytes {
                    _ if stride == shape.element_bytes => to.copy_from_slice(from),
                    1 => collect::<1>(from, stride, to),
                    2 => collect::<2>(from, stride, to),
                    4 => collect::<4>(from, stride, to),
                    _ => collect::<8>(from, stride, to),
                }
            }
            Self::ToBlocks(from, to) => {
                let from = from.get(tokens).ok_or_else(outside)?;
                let to = to.get_mut(blocks).ok_or_else(outside)?;
                match shape.element_bytes {
                    _ if stride == shape.element_bytes => to.copy_from_slice(from),
                    1 => spread::<1>(from, to, stride),
                    2 => spread::<2>(from, to, stride),
                    4 => spread::<4>(from, to, stride),
                    _ => spread::<8>(from, to, stride),
                }
            }
        }
        Ok(())
    }
}

/// Puts elements of `N` bytes that lie `stride` apart behind each other.
fn collect<const N: usize>(from: &[u8], stride: usize, to: &mut [u8]) {
    for (from, to) in from.chunks(stride).zip(to.chunks_exact_mut(N)) {
        if let (Some(from), Some(to)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
            *to = *from;
        }
    }
}

/// Puts elements of `N` bytes `stride` apart.
fn spread<const N: usize>(from: &[u8], to: &mut [u8], stride: usize) {
    for (from, to) in from.chunks_exact(N).zip(to.chunks_mut(stride)) {
        if let (Some(from), Some(to)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
            *to = *from;
        }
    }
}

fn outside() -> Error {
    let message = "an element outside of the payload";
    Error::new(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The orders of vLLM's backends: K and V beside each other in each head, tokens or heads
    /// outermost; K by elements and V by tokens; one side.
    fn arbitrary_order() -> impl Strategy<Value = TokenOrder> {
        let sizes = (1_usize..4, 1_usize..6, 1_usize..4, 1_usize..6);
        let element = proptest::sample::select(vec![1_usize, 2, 4, 8]);
        (sizes, element, 0_u8..4).prop_map(
            |((layers, tokens, heads, size), element_bytes, kind)| {
                let heads = if kind == 3 { 1 } else { heads };
                let shape = TokenShape {
                    layers,
                    tokens,
                    heads,
                    head_size: size,
                    element_bytes,
                };
                let head = size * element_bytes;
                let side = |offset, head_stride, token_stride, element_stride| SideOrder {
                    offset,
                    head_stride,
                    token_stride,
                    element_stride,
                };
                let e = element_bytes;
                let sides = match kind {
                    0 => [0, head]
                        .map(|at| side(at, 2 * head, heads * 2 * head, e))
                        .to_vec(),
                    1 => [0, head]
                        .map(|at| side(at, tokens * 2 * head, 2 * head, e))
                        .to_vec(),
                    2 => vec![
                        side(0, tokens * 2 * head, e, tokens * e),
                        side(tokens * head, tokens * 2 * head, head, e),
                    ],
                    _ => vec![side(0, head, head, e)],
                };
                TokenOrder::new(shape, sides).unwrap()
            },
        )
    }

    /// Where the order has each byte of a payload by tokens, said again by other means.
    fn expected(order: &TokenOrder, blocks: &[u8], count: usize) -> Vec<u8> {
        let shape = order.shape;
        let mut tokens = Vec::new();
        for side in &order.sides {
            for layer in 0..shape.layers {
                for token in 0..count * shape.tokens {
                    let (block, token) = (token / shape.tokens, token % shape.tokens);
                    let start = (block * shape.layers + layer) * order.block_bytes();
                    for head in 0..shape.heads {
                        for element in 0..shape.head_size {
                            let at = start
                                + side.offset
                                + head * side.head_stride
                                + token * side.token_stride
                                + element * side.element_stride;
                            tokens.extend_from_slice(&blocks[at..at + shape.element_bytes]);
                        }
                    }
                }
            }
        }
        tokens
    }

    proptest! {
        #[test]
        fn elements_go_where_they_belong_and_back(
            order in arbitrary_order(), count in 1_usize..4, first in 0_usize..3, seed in any::<u8>(),
        ) {
            let bytes = order.payload_bytes(count);
            let blocks: Vec<u8> = (0..bytes).map(|at| (at * 31 + at / 251) as u8 ^ seed).collect();
            let mut tokens = vec![0; bytes];
            order.to_tokens(&blocks, &mut tokens).unwrap();
            prop_assert_eq!(&tokens, &expected(&order, &blocks, count));
            let first = first.min(count);
            let from = order.payload_bytes(first);
            let mut again = vec![0; bytes - from];
            order.to_blocks(&tokens, first, &mut again).unwrap();
            prop_assert_eq!(&again[..], &blocks[from..]);
            prop_assert_eq!(order.token_payload_shape(count).iter().product::<usize>() * order.shape.element_bytes, bytes);
        }
    }

    #[test]
    fn orders_with_gaps_overlaps_or_other_lengths_are_refused() {
        let shape = TokenShape {
            layers: 1,
            tokens: 4,
            heads: 2,
            head_size: 8,
            element_bytes: 2,
        };
        let side = |offset, head_stride, token_stride, element_stride| SideOrder {
            offset,
            head_stride,
            token_stride,
            element_stride,
        };
        let make = |sides: &[SideOrder]| TokenOrder::new(shape, sides.to_vec());
        assert!(make(&[side(0, 32, 64, 2), side(16, 32, 64, 2)]).is_ok());
        assert!(
            make(&[side(0, 32, 64, 2), side(0, 32, 64, 2)]).is_err(),
            "twice"
        );
        assert!(
            make(&[side(0, 32, 64, 2), side(17, 32, 64, 2)]).is_err(),
            "odd"
        );
        assert!(
            make(&[side(0, 32, 64, 2), side(32, 32, 64, 2)]).is_err(),
            "outside"
        );
        assert!(
            make(&[side(0, usize::MAX, usize::MAX, 2)]).is_err(),
            "overflow"
        );
        assert!(make(&[]).is_err(), "no side");
        let odd = TokenShape {
            element_bytes: 3,
            ..shape
        };
        assert!(TokenOrder::new(odd, vec![side(0, 24, 48, 3)]).is_err());
        let order = make(&[side(0, 32, 64, 2), side(16, 32, 64, 2)]).unwrap();
        assert_eq!(order.block_bytes(), 256);
        let (blocks, mut tokens) = ([0; 256], [0; 512]);
        assert!(order.to_tokens(&blocks, &mut tokens).is_err());
        assert!(order.to_tokens(&blocks[..200], &mut tokens[..200]).is_err());
        assert!(order.to_blocks(&tokens, 1, &mut [0; 512]).is_err());
        assert!(order.to_blocks(&tokens, 1, &mut [0; 256]).is_ok());
    }
}
