//! A KV cache in host memory as vLLM lays it out, with room for a bounded number of chunks.
//!
//! One region holds all layers, the layer outermost. The blocks of a chunk are scattered, as they
//! are in a server that has run for a while: no two runs of a transfer plan merge.

use kvrail::{KvLayout, LayerSpan, Region};

use super::geometry::Geometry;
use super::random::Random;
use crate::failure::Failure;

/// Bytes that no stored block consists of; what a load does not write stays this.
const POISON: u8 = 0xa5;

/// Memory for the blocks of `slots` chunks. A slot is used again for a later chunk.
pub(crate) struct KvMemory {
    region: Region,
    geometry: Geometry,
    slots: usize,
    /// The block ids of all slots, one slot behind the other.
    blocks: Vec<usize>,
}

impl KvMemory {
    /// Maps the memory.
    pub(crate) fn new(geometry: Geometry, slots: usize) -> Result<Self, Failure> {
        let mut blocks: Vec<usize> = (0..slots * geometry.blocks_per_chunk()).collect();
        Random::new(1).shuffle(&mut blocks);
        let region = Region::zeroed(geometry.payload_bytes() * slots)?;
        Ok(Self {
            region,
            geometry,
            slots,
            blocks,
        })
    }

    /// Returns the memory for [`kvrail::Store::attach`].
    pub(crate) fn region(&self) -> Region {
        self.region.clone()
    }

    /// Returns where layers and blocks lie.
    pub(crate) fn layout(&self) -> Result<KvLayout, Failure> {
        let (block_bytes, block_count) = (self.geometry.block_bytes(), self.blocks.len());
        let layers = (0..self.geometry.layers)
            .map(|layer| LayerSpan {
                region: 0,
                offset: layer * block_count * block_bytes,
                block_stride: block_bytes,
                block_bytes,
            })
            .collect();
        Ok(KvLayout::new(layers, block_count, &[self.region.bytes()])?)
    }

    /// Returns the chunks that fit in.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Returns the block ids of a slot.
    pub(crate) fn blocks(&self, slot: usize) -> Vec<usize> {
        let count = self.geometry.blocks_per_chunk();
        self.blocks
            .iter()
            .skip(slot * count)
            .take(count)
            .copied()
            .collect()
    }

    /// Fills everything with random bytes.
    pub(crate) fn fill(&self, random: &mut Random) -> Result<(), Failure> {
        let mut buffer = vec![0; self.geometry.block_bytes()];
        for offset in (0..self.region.bytes()).step_by(buffer.len()) {
            random.fill(&mut buffer);
            self.region.copy_in(offset, &buffer)?;
        }
        Ok(())
    }

    /// Overwrites everything, so that a load that writes nothing is seen.
    pub(crate) fn poison(&self) -> Result<(), Failure> {
        let buffer = vec![POISON; self.geometry.block_bytes()];
        for offset in (0..self.region.bytes()).step_by(buffer.len()) {
            self.region.copy_in(offset, &buffer)?;
        }
        Ok(())
    }

    /// Copies a whole payload to where a slot's blocks would lie if they lay in one piece.
    pub(crate) fn copy_whole(&self, slot: usize, payload: &[u8]) -> Result<(), Failure> {
        Ok(self
            .region
            .copy_in(slot * self.geometry.payload_bytes(), payload)?)
    }

    /// Makes a slot's bytes those of one chunk: writes its number and place into each block of each
    /// layer, so that chunks that share a slot differ everywhere.
    pub(crate) fn stamp(&self, slot: usize, chunk: u64) -> Result<(), Failure> {
        for (place, offset) in self.pieces(slot).into_iter().enumerate() {
            self.region.copy_in(offset, &stamp_of(chunk, place))?;
        }
        Ok(())
    }

    /// Makes a slot's bytes those of no chunk, for each block of each layer.
    pub(crate) fn wipe(&self, slot: usize) -> Result<(), Failure> {
        for offset in self.pieces(slot) {
            self.region.copy_in(offset, &[POISON; 8])?;
        }
        Ok(())
    }

    /// Returns whether each block of each layer of a slot has the stamp of a chunk.
    pub(crate) fn is_stamped(&self, slot: usize, chunk: u64) -> Result<bool, Failure> {
        let mut found = [0; 8];
        for (place, offset) in self.pieces(slot).into_iter().enumerate() {
            self.region.copy_out(offset, &mut found)?;
            if found != stamp_of(chunk, place) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns whether a slot holds the same bytes as that slot of `other`, all of them.
    pub(crate) fn equals(&self, other: &Self, slot: usize) -> Result<bool, Failure> {
        let mut ours = vec![0; self.geometry.block_bytes()];
        let mut theirs = vec![0; self.geometry.block_bytes()];
        for offset in self.pieces(slot) {
            self.region.copy_out(offset, &mut ours)?;
            other.region.copy_out(offset, &mut theirs)?;
            if ours != theirs {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the offset of each block of each layer of a slot.
    fn pieces(&self, slot: usize) -> Vec<usize> {
        let (block_bytes, block_count) = (self.geometry.block_bytes(), self.blocks.len());
        let blocks = self.blocks(slot);
        (0..self.geometry.layers)
            .flat_map(|layer| {
                blocks
                    .iter()
                    .map(move |block| (layer * block_count + block) * block_bytes)
            })
            .collect()
    }
}

/// What a chunk has in the block and layer of a place.
fn stamp_of(chunk: u64, place: usize) -> [u8; 8] {
    let mut mixed = Random::new(chunk.rotate_left(32) ^ place as u64);
    mixed.next().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::geometry::Model;
    use super::*;

    #[test]
    fn slots_are_told_apart_by_chunk_and_share_no_byte() {
        let geometry = Model::Smollm2.geometries().remove(0);
        let (ours, theirs) = (
            KvMemory::new(geometry, 2).unwrap(),
            KvMemory::new(geometry, 2).unwrap(),
        );
        ours.fill(&mut Random::new(7)).unwrap();
        theirs.fill(&mut Random::new(7)).unwrap();
        assert!(ours.equals(&theirs, 0).unwrap() && ours.equals(&theirs, 1).unwrap());
        theirs.stamp(1, 5).unwrap();
        assert!(
            ours.equals(&theirs, 0).unwrap(),
            "a stamp of slot 1 changed slot 0"
        );
        assert!(!ours.equals(&theirs, 1).unwrap());
        ours.stamp(1, 5).unwrap();
        assert!(ours.equals(&theirs, 1).unwrap());
        assert!(ours.is_stamped(1, 5).unwrap() && !ours.is_stamped(1, 6).unwrap());
        ours.stamp(0, 5).unwrap();
        ours.wipe(1).unwrap();
        assert!(ours.is_stamped(0, 5).unwrap() && !ours.is_stamped(1, 5).unwrap());
        let mut all: Vec<usize> = ours.pieces(0).into_iter().chain(ours.pieces(1)).collect();
        all.sort_unstable();
        let expected: Vec<usize> = (0..ours.region.bytes())
            .step_by(geometry.block_bytes())
            .collect();
        assert_eq!(all, expected);
    }
}
