//! A chunk to load, on its way through the queue, and the memory that it passes.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvrail_cuda::{Event, Stream};

use super::batch::Member;
use super::cache_shared::CacheShared;
use super::gpu::Route;
use super::ticket::LoadReport;
use super::watch::Watched;
use crate::chunk::{ChunkRef, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GpuSlot, StagingRange};

/// One chunk to load.
#[derive(Debug)]
pub(super) struct LoadJob {
    pub(super) cache: Arc<CacheShared>,
    pub(super) chunk: ChunkRef,
    /// Payload bytes that are wanted.
    pub(super) payload: Range<usize>,
    /// Where they go. Planned when the load runs: a waiting plan of many layers is large.
    pub(super) blocks: Vec<usize>,
    /// On a GPU: what the blocks may be written after.
    pub(super) after: Option<Arc<Event>>,
    pub(super) member: Member<LoadReport>,
    /// When it was asked for, with all others of its request.
    pub(super) submitted: Instant,
    /// When the work on it began; the wait limit counts from here.
    pub(super) started: Option<Instant>,
    /// The way it takes: cuFile's once, then that of POSIX.
    pub(super) route: Route,
    /// Why cuFile did not load it.
    pub(super) cufile_error: Option<Error>,
    /// What the watch knows it by.
    pub(super) watched: Arc<Watched>,
    /// When it was used, where its file is to be told.
    pub(super) used_at: Option<i64>,
    /// Whose files are to be told of it, once it was loaded from them.
    pub(super) served_by: Mutex<Vec<Part>>,
}

/// The memory that a load passes.
#[derive(Debug)]
pub(super) enum LoadBuffer {
    /// A staging buffer of the host.
    Host(StagingRange),
    /// A slot of VRAM: for the whole image, or for head and page table.
    Slot(Box<GpuSlot>),
}

impl LoadJob {
    /// Notes whose file is to be told that the chunk was used.
    pub(super) fn note_use(&self, part: Part) {
        let mut parts = self
            .served_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        parts.push(part);
    }

    /// Takes the memory that the load passes, if it is free.
    pub(super) fn try_take_buffer(&self) -> Option<LoadBuffer> {
        match (&self.cache.gpu, self.route) {
            (Some(gpu), Route::Slot | Route::InPlace) => {
                gpu.try_take(self.route).map(Box::new).map(LoadBuffer::Slot)
            }
            _ => self.cache.pool.try_take(0).map(LoadBuffer::Host),
        }
    }

    /// Takes the memory that the load passes, waiting for it until `deadline`.
    pub(super) fn take_buffer(&self, deadline: Instant) -> Result<LoadBuffer> {
        match (&self.cache.gpu, self.route) {
            (Some(gpu), Route::Slot | Route::InPlace) => {
                let slot = gpu.take(self.route, deadline)?;
                Ok(LoadBuffer::Slot(Box::new(slot)))
            }
            _ => self.cache.pool.take(deadline).map(LoadBuffer::Host),
        }
    }

    /// Has `stream` wait for what was on the compute stream when the load was asked for.
    ///
    /// It may still use the blocks: a forward that writes behind the end of their last owner, a
    /// gather that reads them.
    pub(super) fn order_after(&self, stream: &Stream) -> Result<()> {
        let ordered = self.after.as_ref().map(|before| stream.wait_for(before));
        ordered
            .transpose()
            .map(drop)
            .map_err(|error| Error::gpu("order a load behind the forward", error))
    }

    /// Waits for it here, where no stream can.
    pub(super) fn wait_before(&self, deadline: Instant) -> Result<()> {
        match self.after.as_ref().map(|before| before.wait(deadline)) {
            None | Some(Ok(true)) => Ok(()),
            Some(Ok(false)) => Err(Error::new(
                ErrorKind::TimedOut,
                "the forward before a load did not end in time",
            )),
            Some(Err(error)) => Err(Error::gpu("wait for the forward before a load", error)),
        }
    }
}
