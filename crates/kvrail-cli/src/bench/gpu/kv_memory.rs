//! A KV cache in the memory of a GPU, half of it to store from and half to load into.
//!
//! The host keeps what each byte should be; whole memory is sent and compared, so that a byte
//! written where none belongs is seen, too. Nothing of that is timed.

use clap::ValueEnum;
use kvrail::memory::Gpu;
use kvrail::{KvLayout, LayerSpan, Region};

use super::super::geometry::Geometry;
use super::super::random::Random;
use super::super::submission::slot_of;
use crate::failure::Failure;

/// Bytes that no stored block consists of; what a load does not write stays this.
const POISON: u8 = 0xa5;
/// Bytes that are brought back and compared at a time.
const COMPARE_BYTES: usize = 16 << 20;

/// Which axis of a KV cache is the outermost in memory, as vLLM names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Outermost {
    /// The layer: a block's bytes lie in as many places as there are layers (vLLM's default)
    #[value(name = "lb")]
    Layer,
    /// The block: its bytes of all layers follow each other
    #[value(name = "bl")]
    Block,
}

impl Outermost {
    /// Returns the name that the command line has for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Layer => "lb",
            Self::Block => "bl",
        }
    }
}

/// Memory for the blocks of `slots` chunks to store from, and of as many to load into.
pub(crate) struct GpuKvMemory {
    gpu: Gpu,
    region: Region,
    geometry: Geometry,
    layout: KvLayout,
    slots: usize,
    /// The block ids of all slots, scattered as in a server that has run for a while.
    blocks: Vec<usize>,
    /// What the memory should hold.
    mirror: Vec<u8>,
}

impl GpuKvMemory {
    /// Allocates and fills the memory.
    pub(crate) fn new(
        gpu: &Gpu,
        geometry: Geometry,
        outermost: Outermost,
        slots: usize,
    ) -> Result<Self, Failure> {
        let mut blocks: Vec<usize> = (0..2 * slots * geometry.blocks_per_chunk()).collect();
        Random::new(1).shuffle(&mut blocks);
        let (count, block_bytes) = (blocks.len(), geometry.block_bytes());
        let spans = (0..geometry.layers).map(|layer| match outermost {
            Outermost::Layer => LayerSpan {
                region: 0,
                offset: layer * count * block_bytes,
                block_stride: block_bytes,
                block_bytes,
            },
            Outermost::Block => LayerSpan {
                region: 0,
                offset: layer * block_bytes,
                block_stride: geometry.layers * block_bytes,
                block_bytes,
            },
        });
        let bytes = geometry.layers * count * block_bytes;
        let layout = KvLayout::new(spans.collect(), count, &[bytes])?;
        let mut mirror = vec![0; bytes];
        Random::new(0x6b76_7261_696c).fill(&mut mirror);
        Ok(Self {
            region: gpu.allocate(bytes).map_err(|error| {
                Failure::from(error).with_hint("free GPU memory, or give less --memory-mib")
            })?,
            gpu: gpu.clone(),
            geometry,
            layout,
            slots,
            blocks,
            mirror,
        })
    }

    /// Returns the memory for [`kvrail::Store::attach`].
    pub(crate) fn region(&self) -> Region {
        self.region.clone()
    }

    /// Returns where layers and blocks lie.
    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Returns the chunks that fit in, to store from or to load into.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Returns the block ids to store a slot's chunk from.
    pub(crate) fn source_blocks(&self, slot: usize) -> Vec<usize> {
        let count = self.geometry.blocks_per_chunk();
        let blocks = self.blocks.iter().skip(slot * count);
        blocks.take(count).copied().collect()
    }

    /// Returns the block ids to load a slot's chunk into.
    pub(crate) fn target_blocks(&self, slot: usize) -> Vec<usize> {
        self.source_blocks(self.slots + slot)
    }

    /// Makes the sources those of a wave's chunks: each block of each layer gets the chunk's number
    /// and its place, so that chunks that share a slot differ everywhere.
    pub(crate) fn send_sources(&mut self, wave: &[u64]) -> Result<(), Failure> {
        for item in wave {
            let pieces = self.pieces(&self.source_blocks(slot_of(wave, *item)));
            for (place, offset) in pieces.into_iter().enumerate() {
                let mark = Random::new(item.rotate_left(32) ^ place as u64).next();
                if let Some(target) = self.mirror.get_mut(offset..offset + 8) {
                    target.copy_from_slice(&mark.to_le_bytes());
                }
            }
        }
        self.send()
    }

    /// Overwrites all targets, so that a load that writes nothing is seen.
    pub(crate) fn send_poison(&mut self) -> Result<(), Failure> {
        let block_bytes = self.geometry.block_bytes();
        for slot in 0..self.slots {
            for offset in self.pieces(&self.target_blocks(slot)) {
                if let Some(target) = self.mirror.get_mut(offset..offset + block_bytes) {
                    target.fill(POISON);
                }
            }
        }
        self.send()
    }

    /// Checks that the targets of a wave's chunks hold what their sources do, and that nothing
    /// else was written to.
    pub(crate) fn check(&mut self, wave: &[u64]) -> Result<(), Failure> {
        let block_bytes = self.geometry.block_bytes();
        for item in wave {
            let slot = slot_of(wave, *item);
            let sources = self.pieces(&self.source_blocks(slot));
            let targets = self.pieces(&self.target_blocks(slot));
            for (source, target) in sources.into_iter().zip(targets) {
                self.mirror
                    .copy_within(source..source + block_bytes, target);
            }
        }
        let mut found = vec![0; COMPARE_BYTES.min(self.mirror.len())];
        for (index, expected) in self.mirror.chunks(found.len()).enumerate() {
            let found = found.get_mut(..expected.len()).unwrap_or_default();
            self.gpu.read(&self.region, index * COMPARE_BYTES, found)?;
            if found != expected {
                let message = format!(
                    "chunks {:?} to {:?} were loaded with other bytes than stored",
                    wave.first().unwrap_or(&0),
                    wave.last().unwrap_or(&0)
                );
                return Err(Failure::new(message).damaged());
            }
        }
        Ok(())
    }

    fn send(&self) -> Result<(), Failure> {
        Ok(self.gpu.write(&self.region, 0, &self.mirror)?)
    }

    /// Returns the offset of each block of each layer.
    fn pieces(&self, blocks: &[usize]) -> Vec<usize> {
        let layers = self.layout.layers();
        blocks
            .iter()
            .flat_map(|block| {
                let offset = move |layer: &LayerSpan| layer.offset + block * layer.block_stride;
                layers.iter().map(offset)
            })
            .collect()
    }
}
