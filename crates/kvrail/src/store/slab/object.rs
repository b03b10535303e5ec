//! Objects and the slab that they lie in.

use super::kinds::KindId;
use crate::chunk::ChunkKey;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{KvLayout, LayerSpan};
use crate::memory::Region;

/// What an object is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectName {
    /// Its kind, as [`SlabStore::kind`](super::SlabStore::kind) returned it.
    pub kind: KindId,
    /// Its KV cache group.
    pub group: u32,
    /// Its rank.
    pub rank: u32,
    /// Its key.
    pub key: ChunkKey,
}

/// An object, and where it lies in the slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlabObject {
    /// Which object.
    pub name: ObjectName,
    /// The address of its first byte; its length is that of its kind.
    pub address: usize,
}

/// One piece of host memory in which all objects lie.
#[derive(Debug, Clone)]
pub struct Slab {
    /// The memory.
    pub region: Region,
    /// The address of its first byte.
    pub address: usize,
    /// What all addresses of objects are a multiple of, counted from the slab's start, in bytes.
    pub align: usize,
}

impl Slab {
    /// Returns the bytes of the blocks that the slab is divided into for objects of `bytes` bytes:
    /// the largest of which every object is a whole run.
    pub(super) fn block_bytes(&self, bytes: usize) -> usize {
        greatest_common_divisor(self.align, bytes)
    }

    /// Returns the slab as the KV cache of objects of `bytes` bytes, and the blocks of one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for objects without bytes, or larger than the slab.
    pub(super) fn layout(&self, bytes: usize) -> Result<(KvLayout, usize)> {
        if bytes == 0 || self.align == 0 || bytes > self.region.bytes() {
            let message = format!(
                "objects of {bytes} bytes in a slab of {}, aligned to {}",
                self.region.bytes(),
                self.align
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let block = self.block_bytes(bytes);
        let span = LayerSpan {
            region: 0,
            offset: 0,
            block_stride: block,
            block_bytes: block,
        };
        let count = self.region.bytes() / block;
        let layout = KvLayout::new(vec![span], count, &[self.region.bytes()])?;
        Ok((layout, bytes / block))
    }

    /// Returns the blocks of an object of `bytes` bytes at `address`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when it does not lie in the slab, or is not aligned.
    pub(super) fn blocks(&self, address: usize, bytes: usize) -> Result<Vec<usize>> {
        let offset = address.checked_sub(self.address);
        let inside = offset.filter(|offset| {
            offset.is_multiple_of(self.align)
                && offset
                    .checked_add(bytes)
                    .is_some_and(|end| end <= self.region.bytes())
        });
        let Some(offset) = inside else {
            let message = format!(
                "{bytes} bytes at {address:#x}: expected a multiple of {} bytes into the slab of {} at {:#x}",
                self.align,
                self.region.bytes(),
                self.address
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        };
        let block = self.block_bytes(bytes);
        Ok((offset / block..(offset + bytes) / block).collect())
    }
}

fn greatest_common_divisor(mut left: usize, mut right: usize) -> usize {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slab(bytes: usize, align: usize) -> Slab {
        Slab {
            region: Region::zeroed(bytes).unwrap(),
            address: 1 << 20,
            align,
        }
    }

    #[test]
    fn every_object_is_a_run_of_blocks_that_covers_it() {
        let slab = slab(1 << 16, 4096);
        for bytes in [4096, 12288, 5120, 1000, 1, 1 << 16] {
            let (layout, count) = slab.layout(bytes).unwrap();
            assert_eq!(count * layout.block_bytes(), bytes);
            for offset in [0, 4096, (1 << 16) - 4096] {
                let blocks = slab.blocks((1 << 20) + offset, bytes);
                if offset + bytes > 1 << 16 {
                    assert!(blocks.is_err());
                    continue;
                }
                let blocks = blocks.unwrap();
                assert_eq!(blocks.len(), count);
                assert_eq!(blocks[0] * layout.block_bytes(), offset);
                assert!(blocks.windows(2).all(|pair| pair[1] == pair[0] + 1));
                assert!(blocks[count - 1] < layout.block_count());
            }
        }
    }

    #[test]
    fn what_lies_elsewhere_is_refused() {
        let slab = slab(1 << 16, 4096);
        for address in [
            0,
            (1 << 20) - 4096,
            (1 << 20) + 64,
            (1 << 20) + (1 << 16),
            usize::MAX,
        ] {
            let error = slab.blocks(address, 4096).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{address:#x}");
        }
        assert!(slab.layout(0).is_err() && slab.layout((1 << 16) + 1).is_err());
    }
}
