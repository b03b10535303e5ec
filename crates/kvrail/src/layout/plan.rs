//! The transfer plan: (layout, block ids) -> memory ranges in payload order.

use super::kv_layout::{KvLayout, Regular};
use crate::error::{Error, ErrorKind, Result};

/// A run of bytes in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Index of the region.
    pub region: usize,
    /// Bytes from the region's start.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// The memory ranges that make up a payload, in payload order, adjacent ones merged.
///
/// A pure value: copying, direct I/O and GPU kernels all follow the same list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferPlan {
    ranges: Vec<MemoryRange>,
    bytes: usize,
    regular: Option<Regular>,
}

impl TransferPlan {
    /// Plans the payload of `blocks`: for each block, for each layer, that layer's block bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a block id outside the layout.
    pub fn new(layout: &KvLayout, blocks: &[usize]) -> Result<Self> {
        let mut ranges: Vec<MemoryRange> = Vec::with_capacity(blocks.len() * layout.layer_count());
        for &block in blocks {
            if block >= layout.block_count() {
                let count = layout.block_count();
                let message = format!("block {block}: the KV cache has {count} blocks");
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
            for layer in layout.layers() {
                let offset = layer.offset + block * layer.block_stride;
                let next = MemoryRange {
                    region: layer.region,
                    offset,
                    bytes: layer.block_bytes,
                };
                match ranges.last_mut() {
                    Some(last)
                        if last.region == next.region && last.offset + last.bytes == offset =>
                    {
                        last.bytes += next.bytes;
                    }
                    _ => ranges.push(next),
                }
            }
        }
        Ok(Self {
            ranges,
            bytes: blocks.len() * layout.block_bytes(),
            regular: layout.regular(),
        })
    }

    /// Returns the ranges in payload order.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// Returns what the ranges have in common where the layout is a regular one: the first piece of
    /// each block, as long as the others, and how these follow it. The pieces of all blocks, one
    /// after the other, are the ranges, with nothing merged.
    pub fn regular(&self) -> Option<(Regular, Vec<MemoryRange>)> {
        let regular = self.regular?;
        let pieces = self.ranges.iter().flat_map(|range| {
            (0..range.bytes)
                .step_by(regular.bytes)
                .map(|done| MemoryRange {
                    region: range.region,
                    offset: range.offset + done,
                    bytes: regular.bytes,
                })
        });
        Some((regular, pieces.step_by(regular.pieces).collect()))
    }

    /// Returns the bytes of all ranges together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::LayerSpan;
    use super::*;

    /// Layouts as vLLM makes them: all layers in one region, layer or block outermost, with gaps.
    fn arbitrary_layout() -> impl Strategy<Value = KvLayout> {
        (
            1_usize..6,
            1_usize..20,
            1_usize..50,
            0_usize..9,
            any::<bool>(),
            any::<bool>(),
        )
            .prop_map(|(layers, blocks, bytes, gap, block_outermost, unequal)| {
                let sizes: Vec<usize> = (0..layers)
                    .map(|l| if unequal { bytes + l } else { bytes })
                    .collect();
                let row: usize = sizes.iter().sum::<usize>() + gap;
                let mut offset = 0;
                let spans = sizes
                    .iter()
                    .map(|&block_bytes| {
                        let stride = if block_outermost {
                            row
                        } else {
                            block_bytes + gap
                        };
                        let span = LayerSpan {
                            region: 0,
                            offset,
                            block_stride: stride,
                            block_bytes,
                        };
                        offset += if block_outermost {
                            block_bytes
                        } else {
                            stride * blocks
                        };
                        span
                    })
                    .collect();
                let end = if block_outermost {
                    row * blocks
                } else {
                    offset
                };
                KvLayout::new(spans, blocks, &[end]).unwrap()
            })
    }

    proptest! {
        #[test]
        fn a_plan_covers_every_byte_of_its_blocks_once(
            (layout, blocks) in arbitrary_layout().prop_flat_map(|layout| {
                let ids: Vec<usize> = (0..layout.block_count()).collect();
                let some = proptest::sample::subsequence(ids.clone(), 0..=ids.len());
                (Just(layout), some.prop_shuffle())
            })
        ) {
            let plan = TransferPlan::new(&layout, &blocks).unwrap();
            let mut planned: Vec<usize> = plan
                .ranges()
                .iter()
                .flat_map(|range| range.offset..range.offset + range.bytes)
                .collect();
            let expected: Vec<usize> = blocks
                .iter()
                .flat_map(|&b| layout.layers().iter().flat_map(move |layer| {
                    let start = layer.offset + b * layer.block_stride;
                    start..start + layer.block_bytes
                }))
                .collect();
            prop_assert_eq!(&planned, &expected, "payload order");
            prop_assert_eq!(plan.bytes(), planned.len());
            planned.sort_unstable();
            planned.dedup();
            prop_assert_eq!(planned.len(), expected.len(), "no byte twice");
        }

        #[test]
        fn a_regular_layout_gives_all_pieces_from_the_first_of_each_block(
            (layout, blocks) in arbitrary_layout().prop_flat_map(|layout| {
                let ids: Vec<usize> = (0..layout.block_count()).collect();
                let some = proptest::sample::subsequence(ids.clone(), 0..=ids.len());
                (Just(layout), some.prop_shuffle())
            })
        ) {
            let plan = TransferPlan::new(&layout, &blocks).unwrap();
            let sizes: Vec<usize> = layout.layers().iter().map(|layer| layer.block_bytes).collect();
            let Some((regular, firsts)) = plan.regular() else {
                prop_assert!(sizes.windows(2).any(|pair| pair[0] != pair[1]));
                return Ok(());
            };
            let bytes = |range: &MemoryRange| range.offset..range.offset + range.bytes;
            let pieces: Vec<usize> = firsts
                .iter()
                .flat_map(|first| (0..regular.pieces).map(move |number| MemoryRange {
                    offset: first.offset + number * regular.stride,
                    ..*first
                }))
                .flat_map(|range| bytes(&range))
                .collect();
            let planned: Vec<usize> = plan.ranges().iter().flat_map(bytes).collect();
            prop_assert_eq!(pieces, planned);
            prop_assert_eq!(firsts.len(), blocks.len());
        }

        #[test]
        fn neighbours_are_merged(layout in arbitrary_layout()) {
            let blocks: Vec<usize> = (0..layout.block_count()).collect();
            let plan = TransferPlan::new(&layout, &blocks).unwrap();
            for pair in plan.ranges().windows(2) {
                prop_assert_ne!(pair[0].offset + pair[0].bytes, pair[1].offset);
            }
        }
    }

    #[test]
    fn block_outermost_layouts_give_one_run_per_block() {
        let span = |offset| LayerSpan {
            region: 0,
            offset,
            block_stride: 256,
            block_bytes: 64,
        };
        let layout = KvLayout::new((0..4).map(|l| span(l * 64)).collect(), 10, &[2560]).unwrap();
        assert_eq!(
            TransferPlan::new(&layout, &[7, 3]).unwrap().ranges().len(),
            2
        );
        assert_eq!(
            TransferPlan::new(&layout, &[3, 4, 5])
                .unwrap()
                .ranges()
                .len(),
            1
        );
    }

    #[test]
    fn a_block_outside_the_cache_is_refused() {
        let span = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: 8,
            block_bytes: 8,
        };
        let layout = KvLayout::new(vec![span], 4, &[32]).unwrap();
        let error = TransferPlan::new(&layout, &[4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
