//! What the jobs of an attached KV cache share: its form in memory and on disk, and its buffers.

use super::gpu::{GpuSide, Shape};
use super::present::Place;
use super::shared::{Pool, StoreShared};
use super::token_file::TokenFile;
use crate::chunk::{ChunkFormat, ChunkKey, ChunkRef, HeadFields, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{HeadBytes, KvLayout, TokenOrder};
use crate::memory::{Region, StagingPool};

/// What the jobs of a KV cache share.
#[derive(Debug)]
pub(super) struct CacheShared {
    pub(super) group: u32,
    pub(super) part: Part,
    /// The form that a chunk has in memory, and in kvrail's own files.
    pub(super) format: ChunkFormat,
    /// The form of its file, where that is another one.
    pub(super) token_file: Option<TokenFile>,
    /// How blocks are divided among heads, where the part is a range of them.
    pub(super) heads: Option<HeadBytes>,
    pub(super) regions: Vec<Region>,
    pub(super) pool: StagingPool,
    /// How many of the pool's buffers are not the tier's.
    pub(super) staging: usize,
    pub(super) layout: KvLayout,
    /// Where the KV cache lies in the memory of a GPU.
    pub(super) gpu: Option<GpuSide>,
    pub(super) blocks_per_chunk: usize,
    namespace: String,
    tokens: usize,
}

/// Returns how many of `count` buffers or slots stores leave to loads: a quarter, and of several one
/// at least.
pub(super) fn left_to_loads(count: usize) -> usize {
    if count == 1 { 0 } else { (count / 4).max(1) }
}

impl CacheShared {
    /// Makes the parts of an attached KV cache: its form, its staging buffers, its side of a GPU.
    ///
    /// # Errors
    /// As [`Store::attach`](super::Store::attach).
    pub(super) fn new(store: &StoreShared, attachment: Attachment) -> Result<Self> {
        let Attachment {
            group,
            part,
            layout,
            regions,
            blocks_per_chunk,
            order,
        } = attachment;
        let format = ChunkFormat::new(layout.payload_shape(blocks_per_chunk))?;
        let token_file = TokenFile::of(store, &layout, &format, order)?;
        if let Some(layer) = layout
            .layers()
            .iter()
            .find(|layer| layer.region >= regions.len())
        {
            let message = format!(
                "layout names region {}, there are {}",
                layer.region,
                regions.len()
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let heads = part.heads();
        let heads = heads.map(|heads| HeadBytes::new(&layout, heads.count()));
        let heads = heads.transpose()?;
        let gpu = store.gpus.of(store, &regions)?;
        let pool = store.staging_pool(format.file_bytes(), gpu.as_ref())?;
        let shape = Shape {
            layout: &layout,
            format: &format,
            regions: &regions,
            blocks: blocks_per_chunk,
        };
        let Pool {
            buffers: pool,
            staging,
            ..
        } = pool;
        let side = |opened| GpuSide::new(store, opened, shape, staging);
        let gpu = gpu.map(side).transpose()?;
        Ok(Self {
            group,
            part,
            format,
            token_file,
            heads,
            regions,
            pool,
            staging,
            layout,
            gpu,
            blocks_per_chunk,
            namespace: store.namespace.id().to_owned(),
            tokens: store.chunk_size,
        })
    }

    /// A KV cache in host memory that belongs to no store, for tests of parts.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn on_host(
        layout: KvLayout,
        regions: Vec<Region>,
        pool: StagingPool,
        blocks_per_chunk: usize,
    ) -> Result<Self> {
        Ok(Self {
            group: 0,
            part: 0.into(),
            format: ChunkFormat::new(layout.payload_shape(blocks_per_chunk))?,
            token_file: None,
            heads: None,
            regions,
            staging: pool.slot_count(),
            pool,
            layout,
            gpu: None,
            blocks_per_chunk,
            namespace: "model".to_owned(),
            tokens: 16,
        })
    }

    /// Returns what a head of this KV cache's chunks says.
    pub(super) fn head_fields(&self, chunk: ChunkRef) -> HeadFields {
        self.head_fields_of(self.part, chunk)
    }

    /// Returns what the head of a chunk says that is of another part.
    pub(super) fn head_fields_of(&self, part: Part, chunk: ChunkRef) -> HeadFields {
        HeadFields {
            namespace: self.namespace.clone(),
            group: self.group,
            rank: part,
            tokens: self.tokens,
            chunk,
        }
    }

    /// Returns the bytes of a chunk's file.
    pub(super) fn file_bytes(&self) -> usize {
        self.token_file
            .as_ref()
            .map_or(self.format.file_bytes(), TokenFile::file_bytes)
    }

    pub(super) fn place(&self, key: &ChunkKey) -> Place {
        (self.group, self.part, *key)
    }
}

/// What `attach` is told about a KV cache.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) group: u32,
    pub(super) part: Part,
    pub(super) layout: KvLayout,
    pub(super) regions: Vec<Region>,
    pub(super) blocks_per_chunk: usize,
    pub(super) order: Option<TokenOrder>,
}
