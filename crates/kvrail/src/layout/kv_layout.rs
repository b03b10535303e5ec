//! The geometry of one KV cache group on one rank.

use crate::error::{Error, ErrorKind, Result};

/// Where one layer's blocks lie: block `b` is at `offset + b * block_stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpan {
    /// Index of the region that holds the layer.
    pub region: usize,
    /// Bytes from the region's start to block 0.
    pub offset: usize,
    /// Bytes from one block to the next.
    pub block_stride: usize,
    /// Bytes of one block of this layer.
    pub block_bytes: usize,
}

impl LayerSpan {
    /// Returns where the byte behind the last block lies, `None` on overflow.
    fn end(&self, block_count: usize) -> Option<usize> {
        let last = block_count.checked_sub(1)?.checked_mul(self.block_stride)?;
        self.offset.checked_add(last)?.checked_add(self.block_bytes)
    }
}

/// What the blocks of a layout have in common where all layers lie at equal steps in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Regular {
    /// Pieces that a block consists of: one for each layer, or one for all where these follow each
    /// other.
    pub pieces: usize,
    /// Bytes from one piece of a block to its next.
    pub stride: usize,
    /// Bytes of a piece.
    pub bytes: usize,
}

impl Regular {
    fn of(layers: &[LayerSpan]) -> Option<Self> {
        let first = layers.first()?;
        let stride = match layers.get(1) {
            Some(second) => second.offset.checked_sub(first.offset)?,
            None => first.block_bytes,
        };
        let at = |index: usize| first.offset.checked_add(index.checked_mul(stride)?);
        for (index, layer) in layers.iter().enumerate() {
            let expected = LayerSpan {
                offset: at(index)?,
                ..*first
            };
            if *layer != expected {
                return None;
            }
        }
        let merged = stride == first.block_bytes;
        Some(Self {
            pieces: if merged { 1 } else { layers.len() },
            stride,
            bytes: first.block_bytes * if merged { layers.len() } else { 1 },
        })
    }
}

/// The geometry of one KV cache group: its layers in payload order, and its number of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    regular: Option<Regular>,
    layers: Vec<LayerSpan>,
    block_count: usize,
    block_bytes: usize,
}

impl KvLayout {
    /// Makes a layout of `layers` over regions of `region_bytes` bytes each.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when there are no layers or blocks, a layer names no region,
    /// a block is empty or longer than its stride, or a block lies outside its region.
    pub fn new(layers: Vec<LayerSpan>, block_count: usize, region_bytes: &[usize]) -> Result<Self> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        if layers.is_empty() || block_count == 0 {
            return invalid(format!(
                "KV layout of {} layers, {block_count} blocks",
                layers.len()
            ));
        }
        let mut block_bytes = 0_usize;
        for (index, layer) in layers.iter().enumerate() {
            let Some(region) = region_bytes.get(layer.region) else {
                return invalid(format!("layer {index}: no region {}", layer.region));
            };
            if layer.block_bytes == 0 || layer.block_bytes > layer.block_stride {
                return invalid(format!(
                    "layer {index}: blocks of {} bytes every {} bytes",
                    layer.block_bytes, layer.block_stride
                ));
            }
            let end = layer.end(block_count);
            if end.is_none_or(|end| end > *region) {
                return invalid(format!(
                    "layer {index}: {block_count} blocks end at {end:?}, the region at {region}"
                ));
            }
            block_bytes = match block_bytes.checked_add(layer.block_bytes) {
                Some(sum) => sum,
                None => return invalid("block bytes overflow".into()),
            };
        }
        Ok(Self {
            regular: Regular::of(&layers),
            layers,
            block_count,
            block_bytes,
        })
    }

    /// Returns the layers in payload order.
    pub fn layers(&self) -> &[LayerSpan] {
        &self.layers
    }

    /// Returns what all blocks have in common, `None` where the layers lie anywhere.
    pub fn regular(&self) -> Option<Regular> {
        self.regular
    }

    /// Returns the number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Returns the number of blocks in memory.
    pub fn block_count(&self) -> usize {
        self.block_count
    }

    /// Returns the bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Returns the shape of a payload of `blocks` blocks: `[blocks, layers, bytes]` where all
    /// layers have the same block bytes, else `[blocks, 1, bytes]`.
    pub fn payload_shape(&self, blocks: usize) -> [usize; 3] {
        let first = self.layers.first().map_or(0, |layer| layer.block_bytes);
        if self.layers.iter().all(|layer| layer.block_bytes == first) {
            [blocks, self.layers.len(), first]
        } else {
            [blocks, 1, self.block_bytes]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(region: usize, offset: usize, block_stride: usize, block_bytes: usize) -> LayerSpan {
        LayerSpan {
            region,
            offset,
            block_stride,
            block_bytes,
        }
    }

    #[test]
    fn every_bound_is_checked_when_the_layout_is_made() {
        let make = |span, blocks| KvLayout::new(vec![span], blocks, &[1000]);
        assert!(make(layer(0, 0, 100, 100), 10).is_ok());
        assert!(
            make(layer(0, 0, 100, 100), 11).is_err(),
            "beyond the region"
        );
        assert!(
            make(layer(0, 1, 100, 100), 10).is_err(),
            "offset pushes it out"
        );
        assert!(make(layer(1, 0, 100, 100), 10).is_err(), "no such region");
        assert!(make(layer(0, 0, 99, 100), 2).is_err(), "blocks overlap");
        assert!(make(layer(0, 0, 100, 0), 2).is_err(), "empty blocks");
        assert!(make(layer(0, 0, usize::MAX, 1), 3).is_err(), "overflow");
        assert!(KvLayout::new(vec![], 1, &[]).is_err());
    }

    #[test]
    fn unequal_layers_share_one_axis() {
        let even = KvLayout::new(vec![layer(0, 0, 8, 8), layer(0, 80, 8, 8)], 10, &[160]).unwrap();
        assert_eq!(even.payload_shape(4), [4, 2, 8]);
        let odd = KvLayout::new(vec![layer(0, 0, 8, 8), layer(0, 80, 8, 4)], 10, &[160]).unwrap();
        assert_eq!(odd.payload_shape(4), [4, 1, 12]);
    }
}
