//! A chunk on its way out: its image, perhaps still being copied there by a GPU.

use std::sync::Arc;
use std::time::Instant;

use kvrail_cuda::Event;

use super::gpu::{InPlaceImage, LateBuffers, SlotImage};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::StagingRange;

/// A chunk on its way out, by the route that was open when it was staged.
#[derive(Debug)]
pub(super) enum Staged {
    /// In a staging buffer of the host.
    Host(StagedImage),
    /// In a VRAM slot.
    Slot(SlotImage),
    /// In the KV cache.
    InPlace(InPlaceImage),
}

impl Staged {
    /// Returns whether a GPU is not there yet: the forwards in front of the copy may take long.
    pub(super) fn is_pending(&self) -> bool {
        match self {
            Self::Host(image) => image.is_pending(),
            Self::Slot(image) => image.is_pending(),
            Self::InPlace(image) => image.is_pending(),
        }
    }
}

/// The image of a chunk file with its payload in place.
#[derive(Debug)]
pub(super) struct StagedImage {
    /// `None` only when it was taken out.
    image: Option<StagingRange>,
    /// Done when the bytes are there, and who takes the buffer if nobody waits for that; `None` when
    /// they are already.
    arriving: Option<(Arc<Event>, Arc<LateBuffers>)>,
    /// Whether the page table is filled, too.
    hashed: bool,
}

impl StagedImage {
    /// An image whose payload is there.
    pub(super) fn complete(image: StagingRange) -> Self {
        Self {
            image: Some(image),
            arriving: None,
            hashed: false,
        }
    }

    /// An image that a GPU fills until `arriving` is done.
    pub(super) fn arriving(
        image: StagingRange,
        arriving: Arc<Event>,
        late: &Arc<LateBuffers>,
        hashed: bool,
    ) -> Self {
        Self {
            image: Some(image),
            arriving: Some((arriving, Arc::clone(late))),
            hashed,
        }
    }

    fn is_pending(&self) -> bool {
        let arriving = self.arriving.as_ref();
        arriving.is_some_and(|(event, _)| matches!(event.is_done(), Ok(false)))
    }

    /// Waits until the bytes are there. Returns the image, and whether its page table is filled.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] at the deadline, [`ErrorKind::Gpu`] when the copy failed.
    pub(super) fn wait(mut self, deadline: Instant) -> Result<(StagingRange, bool)> {
        if let Some((event, _)) = &self.arriving {
            match event.wait(deadline) {
                Ok(true) => self.arriving = None,
                Ok(false) => {
                    let message = "the GPU did not copy a chunk to the host in time";
                    return Err(Error::new(ErrorKind::TimedOut, message));
                }
                Err(error) => return Err(Error::gpu("copy a chunk to the host", error)),
            }
        }
        let taken = Error::new(ErrorKind::InvalidArgument, "image was taken");
        Ok((self.image.take().ok_or(taken)?, self.hashed))
    }
}

impl Drop for StagedImage {
    fn drop(&mut self) {
        let (Some((event, late)), Some(image)) = (self.arriving.take(), self.image.take()) else {
            return;
        };
        if !matches!(event.is_done(), Ok(true)) {
            late.keep(event, image);
        }
    }
}
