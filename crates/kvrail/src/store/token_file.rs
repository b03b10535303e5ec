//! A chunk file in LMCache's form: its own head, and KV by tokens instead of by blocks.
//!
//! In memory a chunk has kvrail's form, so that staging, GPUs and the DRAM tier know one form only. It
//! is put into the file's form right before it is written, and back right after it was read. The
//! file has no checksum; page table and head of the form in memory are made when it is read.

use super::cache_shared::CacheShared;
use super::image;
use super::save::complete_image;
use super::shared::StoreShared;
use crate::chunk::{ChunkFormat, ChunkRef, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{KvLayout, TokenOrder};
use crate::lmcache::{HEAD_BYTES, MemoryFormat, TensorHead};

/// The payload starts at the same place in both forms, and both move whole pages.
const _: () = assert!(HEAD_BYTES == PAGE_BYTES, "heads of one page");

/// The form of the files of one KV cache.
#[derive(Debug)]
pub(super) struct TokenFile {
    head: TensorHead,
    page: [u8; HEAD_BYTES],
    order: TokenOrder,
}

impl TokenFile {
    /// Returns the form of the files of a store; `None` for kvrail's own.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the order is missing, not asked for, or not that of the
    /// layout; [`ErrorKind::InvalidConfig`] when a chunk does not end with a page.
    pub(super) fn of(
        store: &StoreShared,
        layout: &KvLayout,
        format: &ChunkFormat,
        order: Option<TokenOrder>,
    ) -> Result<Option<Self>> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        let (names, order) = match (&store.lmcache, order) {
            (None, None) => return Ok(None),
            (Some(names), Some(order)) => (names, order),
            _ => return invalid("an order of tokens goes with LMCache's directory only".into()),
        };
        let [blocks, ..] = format.shape();
        let shape = order.shape();
        let fits = layout.layer_count() == shape.layers
            && shape.element_bytes == names.element.bytes()
            && layout
                .layers()
                .iter()
                .all(|layer| layer.block_bytes == order.block_bytes());
        if !fits {
            return invalid(format!(
                "order of tokens {shape:?} is not that of the layout"
            ));
        }
        if format.pad_bytes() > 0 {
            let expected = format!(
                "chunks of whole pages with `layout: lmcache`: {} bytes are no multiple of {PAGE_BYTES}",
                format.payload_bytes()
            );
            return Err(Error::config("chunk_size", store.chunk_size, expected));
        }
        let memory = match order.side_count() {
            1 => MemoryFormat::KvMla,
            _ => MemoryFormat::Kv2ltd,
        };
        let head = TensorHead::new(names.element, &order.token_payload_shape(blocks), memory)?;
        Ok(Some(Self {
            page: head.encode(),
            head,
            order,
        }))
    }

    /// Returns the bytes of the file.
    pub(super) fn file_bytes(&self) -> usize {
        self.head.file_bytes()
    }

    /// Returns the head, which is the whole of the metadata, too.
    pub(super) fn head(&self) -> &[u8] {
        &self.page
    }

    /// Puts the image of a chunk into the file's form, which is the shorter one.
    pub(super) fn take_image(&self, format: &ChunkFormat, image: &mut [u8]) -> Result<()> {
        let payload = image::bytes_mut(image, payload(format))?;
        let blocks = payload.to_vec();
        self.order.to_tokens(&blocks, payload)?;
        image::bytes_mut(image, 0..HEAD_BYTES)?.copy_from_slice(&self.page);
        Ok(())
    }

    /// Puts what was read of a file into the form of a chunk's image.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] when the head is not that of the KV cache's files.
    pub(super) fn give_image(
        &self,
        cache: &CacheShared,
        chunk: ChunkRef,
        image: &mut [u8],
    ) -> Result<()> {
        self.head.check(image::bytes_of(image, 0..HEAD_BYTES)?)?;
        let payload = image::bytes_mut(image, payload(&cache.format))?;
        let tokens = payload.to_vec();
        self.order.to_blocks(&tokens, 0, payload)?;
        complete_image(cache, chunk, image, false)
    }
}

fn payload(format: &ChunkFormat) -> std::ops::Range<usize> {
    format.payload_offset()..format.payload_offset() + format.payload_bytes()
}
