//! The ring of VRAM slots: one holds the image of a chunk file, and what the GPU needs beside it.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvrail_cuda::{COPY_PIECE_BYTES, CopyDescriptor, CuFileDriver, Event, HashDescriptor, Stream};

use super::Gpu;
use crate::chunk::{ChunkFormat, PAGE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::KvLayout;
use crate::memory::{DeviceArena, HostArena, StagingPool, StagingRange};

/// How long a taker sleeps between two looks for a slot that the GPU is done with.
const POLL: Duration = Duration::from_micros(200);
/// Bytes of one copy descriptor, and of one hash descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 24;
const _: () = assert!(size_of::<CopyDescriptor>() == DESCRIPTOR_BYTES);
const _: () = assert!(size_of::<HashDescriptor>() == DESCRIPTOR_BYTES);

/// What a slot must hold for the chunks of one KV cache, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotShape {
    /// The image of a chunk file, or of what of it does not stay in the KV cache.
    pub image: usize,
    /// The page table at the image's end.
    pub table: usize,
    /// Hashes of the payload's pages, 8 bytes each.
    pub hashes: usize,
    /// Copy descriptors, and one hash descriptor behind them.
    pub descriptors: usize,
}

impl SlotShape {
    /// Returns what the chunks of `layout` need, `blocks` blocks each.
    pub fn new(layout: &KvLayout, format: &ChunkFormat, blocks: usize) -> Self {
        let pieces: usize = layout
            .layers()
            .iter()
            .map(|layer| layer.block_bytes.div_ceil(COPY_PIECE_BYTES))
            .sum();
        // Merged ranges have fewer pieces than their parts; three more for padding and table.
        let pieces = pieces * blocks + 3;
        Self {
            image: format.file_bytes(),
            table: format.table_bytes(),
            hashes: page_aligned(format.page_count() * 8),
            descriptors: page_aligned((pieces + 1) * DESCRIPTOR_BYTES),
        }
    }

    /// Returns what chunks of `blocks` blocks need whose payload stays in the KV cache: room for
    /// head and page table, one behind the other.
    pub fn frame(format: &ChunkFormat, blocks: usize) -> Self {
        Self {
            image: PAGE_BYTES + format.table_bytes(),
            table: format.table_bytes(),
            hashes: page_aligned(format.page_count() * 8),
            // One for the padding of the table, one for each block.
            descriptors: page_aligned((blocks + 1) * DESCRIPTOR_BYTES),
        }
    }

    /// Returns where the page table begins in the image.
    pub fn table_offset(&self) -> usize {
        self.image - self.table
    }

    /// Returns the bytes of a slot in VRAM.
    pub fn device_bytes(&self) -> usize {
        self.image + self.hashes + self.descriptors
    }

    /// Returns the bytes of pinned host memory beside it.
    pub fn scratch_bytes(&self) -> usize {
        2 * PAGE_BYTES + self.table + self.hashes + self.descriptors
    }
}

fn page_aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
}

/// VRAM slots, allocated once, as the chunks of one KV cache use them.
#[derive(Debug, Clone)]
pub struct GpuSlots {
    shared: Arc<Shared>,
    shape: SlotShape,
}

/// VRAM slots that are there as long as somebody uses them.
#[derive(Debug, Clone)]
pub struct WeakGpuSlots(Weak<Shared>);

#[derive(Debug)]
struct Shared {
    draining: Mutex<Draining>,
    slots: StagingPool<DeviceArena>,
    scratch: StagingPool<HostArena>,
    /// What the slots were made for, and are large enough for.
    largest: SlotShape,
}

impl WeakGpuSlots {
    /// Returns whether nobody uses them any more.
    pub fn are_gone(&self) -> bool {
        self.0.strong_count() == 0
    }

    /// Returns the slots for chunks of `shape`: `None` when they are gone, or too small.
    pub fn with_shape(&self, shape: SlotShape) -> Option<GpuSlots> {
        let shared = self.0.upgrade()?;
        let largest = &shared.largest;
        let fits = shape.device_bytes() <= largest.device_bytes()
            && shape.scratch_bytes() <= largest.scratch_bytes();
        fits.then_some(GpuSlots { shared, shape })
    }
}

/// What was given back while the GPU still worked on it.
#[derive(Debug, Default)]
struct Draining {
    /// Slots, the first that was given back first.
    slots: Vec<(Option<Arc<Event>>, Parts)>,
    /// The pinned memory of slots whose memory in VRAM is used again already.
    scratch: Vec<(Arc<Event>, HostParts)>,
}

/// The memory of a slot.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) device: DeviceParts,
    pub(super) host: HostParts,
}

/// The memory of a slot in VRAM.
#[derive(Debug)]
pub(super) struct DeviceParts {
    pub(super) image: StagingRange<DeviceArena>,
    pub(super) hashes: StagingRange<DeviceArena>,
    pub(super) descriptors: StagingRange<DeviceArena>,
    /// What chunks of this shape do not need.
    rest: StagingRange<DeviceArena>,
}

impl DeviceParts {
    /// Returns the slot in one piece: what uses it next may cut it in another way.
    fn whole(self) -> Result<StagingRange<DeviceArena>> {
        let mut whole = self.image;
        for part in [self.hashes, self.descriptors, self.rest] {
            whole
                .rejoin(part)
                .map_err(|_| Error::new(ErrorKind::InvalidArgument, "parts of two VRAM slots"))?;
        }
        Ok(whole)
    }
}

/// The pinned memory beside a slot.
#[derive(Debug)]
pub(super) struct HostParts {
    /// A page that is never written: the source of padding.
    pub(super) zeros: StagingRange,
    /// The head of the chunk file.
    pub(super) head: StagingRange,
    /// Its page table.
    pub(super) table: StagingRange,
    pub(super) hashes: StagingRange,
    pub(super) descriptors: StagingRange,
}

/// A slot on loan.
///
/// Dropped while the GPU still works on it, its memory goes back only when the GPU is done.
#[derive(Debug)]
pub struct GpuSlot {
    pub(super) gpu: Gpu,
    /// `None` only while it is dropped or taken apart.
    pub(super) parts: Option<Parts>,
    /// The last mark on a stream that works on this slot.
    pub(super) busy: Option<Arc<Event>>,
    /// Whether work was put on a stream since: only an error leaves it so.
    pub(super) unmarked: bool,
    home: Arc<Shared>,
}

impl GpuSlots {
    /// Allocates `count` slots in VRAM, and registers them with cuFile if its driver is given. The
    /// pinned memory beside a slot is there `uses` times, at least once for each: that many stores
    /// may be on their way at the same time (see [`GpuSlots::take_behind`]).
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] when there is not so much VRAM, naming how much was asked, how much is
    /// free, and what to change; also when the memory beside it cannot be pinned, or cuFile does
    /// not take the slots.
    pub fn new(
        gpu: &Gpu,
        shape: SlotShape,
        count: usize,
        uses: usize,
        cufile: Option<&CuFileDriver>,
    ) -> Result<Self> {
        let bytes = count * shape.device_bytes();
        let memory = match cufile {
            None => gpu.context().allocate(bytes),
            Some(_) => gpu.context().allocate_at_page(bytes),
        };
        let memory = memory.map_err(|error| {
            let free = gpu.context().memory_info().map_or(0, |(free, _)| free);
            let message = format!(
                "{} MiB of staging memory (`cufile_buffer_size`) on cuda:{}: {} MiB are free; lower \
                 `cufile_buffer_size`, or vLLM's `--gpu-memory-utilization`",
                bytes.div_ceil(1 << 20),
                gpu.context().ordinal(),
                free >> 20
            );
            Error::gpu(message, error)
        })?;
        let arena = match cufile {
            None => DeviceArena::new(memory, None),
            Some(driver) => DeviceArena::registered(memory, driver)?,
        };
        let slots = StagingPool::over(arena, shape.device_bytes())?;
        let scratches = count.max(uses);
        let pinned = HostArena::pinned(scratches * shape.scratch_bytes(), gpu.context())?;
        let scratch = StagingPool::over(pinned, shape.scratch_bytes())?;
        Ok(Self {
            shared: Arc::new(Shared {
                draining: Mutex::default(),
                slots,
                scratch,
                largest: shape,
            }),
            shape,
        })
    }

    /// Returns what a slot holds.
    pub fn shape(&self) -> SlotShape {
        self.shape
    }

    /// Returns the slots without a hold on them.
    pub fn downgrade(&self) -> WeakGpuSlots {
        WeakGpuSlots(Arc::downgrade(&self.shared))
    }

    /// Returns whether cuFile knows the slots.
    pub fn is_registered(&self) -> bool {
        self.shared.slots.arena().is_registered()
    }

    /// Returns the number of slots.
    pub fn slot_count(&self) -> usize {
        self.shared.slots.slot_count()
    }

    /// Takes a slot at once if more than `reserve` are free.
    pub fn try_take(&self, gpu: &Gpu, reserve: usize) -> Option<GpuSlot> {
        self.drain();
        let device = self.shared.slots.try_take(reserve)?;
        let host = self.shared.scratch.try_take(0)?;
        let device = self.cut_device(device);
        Some(self.slot(gpu, device, self.cut_host(host), None))
    }

    /// Takes a slot at once: where no more than `reserve` are free, the one that was given back first
    /// of those that the GPU still works on. What is put on `stream` from now on waits for that work
    /// to be over, so the slot is for this stream, and for what is ordered behind it.
    ///
    /// `None` when every slot is somebody's, all but `reserve` of them, or the pinned memory beside
    /// them is all in use.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`].
    pub fn take_behind(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        reserve: usize,
    ) -> Result<Option<GpuSlot>> {
        if let Some(slot) = self.try_take(gpu, reserve) {
            return Ok(Some(slot));
        }
        let Some(host) = self.shared.scratch.try_take(0) else {
            return Ok(None);
        };
        let mut draining = self.draining();
        let is_healthy = |event: &Arc<Event>| event.is_done().is_ok();
        let found = draining
            .slots
            .iter()
            .position(|(event, _)| event.as_ref().is_some_and(is_healthy));
        let Some((Some(event), parts)) = found.map(|index| draining.slots.remove(index)) else {
            return Ok(None);
        };
        draining.scratch.push((Arc::clone(&event), parts.host));
        drop(draining);
        // From here on a slot like any other that the GPU works on, whatever fails.
        let device = self.cut_device(parts.device.whole()?);
        let slot = self.slot(gpu, device, self.cut_host(host), Some(event));
        slot.order_after_mark(stream)?;
        Ok(Some(slot))
    }

    /// Takes a slot, waiting for one until `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when none came free in time.
    pub fn take(&self, gpu: &Gpu, deadline: Instant) -> Result<GpuSlot> {
        loop {
            if let Some(slot) = self.try_take(gpu, 0) {
                return Ok(slot);
            }
            if Instant::now() >= deadline {
                let message = format!("none of {} VRAM slots came free", self.slot_count());
                return Err(Error::new(ErrorKind::TimedOut, message));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Gives back what the GPU is done with, up to the first that it is not: what was given back
    /// later ends later, or not much sooner, and to ask for each of hundreds takes a store's time.
    fn drain(&self) {
        let mut draining = self.draining();
        let mut ended = Ended::default();
        draining.slots.retain(|(event, _)| {
            // Work that cannot be told to be over is never taken to be.
            !event.as_ref().is_some_and(|event| ended.is_next(event))
        });
        let mut ended = Ended::default();
        draining.scratch.retain(|(event, _)| !ended.is_next(event));
    }

    fn draining(&self) -> MutexGuard<'_, Draining> {
        self.shared.draining()
    }

    fn cut_device(&self, mut device: StagingRange<DeviceArena>) -> DeviceParts {
        let shape = &self.shape;
        DeviceParts {
            image: device.split_to(shape.image),
            hashes: device.split_to(shape.hashes),
            descriptors: device.split_to(shape.descriptors),
            rest: device,
        }
    }

    fn cut_host(&self, mut host: StagingRange) -> HostParts {
        let shape = &self.shape;
        HostParts {
            zeros: host.split_to(PAGE_BYTES),
            head: host.split_to(PAGE_BYTES),
            table: host.split_to(shape.table),
            hashes: host.split_to(shape.hashes),
            descriptors: host.split_to(shape.descriptors),
        }
    }

    fn slot(
        &self,
        gpu: &Gpu,
        device: DeviceParts,
        host: HostParts,
        busy: Option<Arc<Event>>,
    ) -> GpuSlot {
        GpuSlot {
            gpu: gpu.clone(),
            parts: Some(Parts { device, host }),
            busy,
            unmarked: false,
            home: Arc::clone(&self.shared),
        }
    }
}

/// Asks one event after the other whether it is over, until one is not.
#[derive(Debug, Default)]
struct Ended {
    met_busy: bool,
}

impl Ended {
    /// Returns whether the next event is known to be over. One that cannot be asked belongs to a
    /// device in trouble: its memory is not used again, and does not keep others waiting.
    fn is_next(&mut self, event: &Event) -> bool {
        if self.met_busy {
            return false;
        }
        let done = event.is_done();
        self.met_busy = matches!(done, Ok(false));
        matches!(done, Ok(true))
    }
}

impl Shared {
    fn draining(&self) -> MutexGuard<'_, Draining> {
        self.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GpuSlot {
    /// Returns a hold of a range of the image, for an engine; the slot goes back when that is
    /// dropped, too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range outside the image.
    pub fn share(&self, range: Range<usize>) -> Result<StagingRange<DeviceArena>> {
        let image = &self.parts()?.device.image;
        if range.start > range.end || range.end > image.len() {
            let message = format!("range {range:?} of an image of {} bytes", image.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let mut rest = image.share();
        drop(rest.split_to(range.start));
        Ok(rest.split_to(range.len()))
    }

    /// Returns whether the GPU may still work on the slot, as far as was asked.
    pub fn is_busy(&self) -> bool {
        self.busy.is_some()
    }

    /// Returns whether the GPU still works on what was marked last. A device that cannot be asked is
    /// not waited for.
    pub fn is_pending(&self) -> bool {
        self.busy
            .as_ref()
            .is_some_and(|event| matches!(event.is_done(), Ok(false)))
    }

    /// Returns the last mark: the event is done when the GPU is done with the slot.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when nothing was put on a stream and marked.
    pub fn release_marked(&self) -> Result<Arc<Event>> {
        let event = self.busy.clone().filter(|_| !self.unmarked);
        event.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                "a VRAM slot with no marked work was released",
            )
        })
    }
}

impl Drop for GpuSlot {
    fn drop(&mut self) {
        let event = self.busy.take();
        let is_idle = event
            .as_ref()
            .is_none_or(|event| matches!(event.is_done(), Ok(true)));
        let Some(parts) = self.parts.take() else {
            return;
        };
        if self.unmarked || !is_idle {
            let event = event.filter(|_| !self.unmarked);
            self.home.draining().slots.push((event, parts));
        }
    }
}
