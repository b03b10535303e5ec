//! What an attached KV cache on a GPU has beside its staging buffers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrail_cuda::Event;
use serde::Serialize;

use super::cufile::Cufile;
use super::devices::Opened;
use super::in_place::InPlace;
use super::late_buffers::LateBuffers;
use super::shared_memory::{SharedMemory, Use};
use crate::chunk::ChunkFormat;
use crate::error::{Error, ErrorKind, Result};
use crate::io::within;
use crate::layout::{KvLayout, TransferPlan};
use crate::memory::{ComputeStream, Gpu, GpuSlot, GpuSlots, Region, SlotShape, Timing};
use crate::store::mount::Mount;
use crate::store::notice::Topic;
use crate::store::shared::StoreShared;

/// VRAM of slots at most where they only lie on the way to pinned memory, if that is not less than
/// [`PINNED_SLOTS_MIN`]: a few hide the latency of each other's copies, more keep the stores of one
/// step from waiting for each other, and take memory from the KV cache.
const PINNED_SLOTS_BYTES: usize = 512 << 20;
/// Slots at least of those: as many chunks are in flight.
const PINNED_SLOTS_MIN: usize = 4;
/// VRAM slots beside a KV cache that is read and written in place: for what falls back to POSIX.
const FALLBACK_SLOTS: usize = 4;
/// Pinned staging buffers beside VRAM slots that cuFile uses: for what falls back to POSIX, four
/// chunks in flight at least.
const FALLBACK_BUFFERS: usize = 8;
/// The longest that one registration with cuFile may take.
const REGISTER_LIMIT: Duration = Duration::from_secs(20);

/// The way of a chunk between KV cache and file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// Through a staging buffer, by POSIX calls; from a GPU one of pinned memory, behind a VRAM slot.
    Posix,
    /// Through a VRAM slot, by cuFile.
    Slot,
    /// Between the blocks themselves and the file, by cuFile.
    InPlace,
}

impl Route {
    /// Returns the word for it: `posix`, `slot` or `in_place`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Posix => "posix",
            Self::Slot => "slot",
            Self::InPlace => "in_place",
        }
    }
}

/// The GPU's part of an attached KV cache.
#[derive(Debug)]
pub(in crate::store) struct GpuSide {
    pub(super) gpu: Gpu,
    pub(super) slots: GpuSlots,
    pub(super) cufile: Option<Arc<Cufile>>,
    pub(super) in_place: Option<InPlace>,
    pub(super) late: Arc<LateBuffers>,
}

/// What a KV cache on a GPU is attached with.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Shape<'a> {
    pub(in crate::store) layout: &'a KvLayout,
    pub(in crate::store) format: &'a ChunkFormat,
    pub(in crate::store) regions: &'a [Region],
    pub(in crate::store) blocks: usize,
}

impl GpuSide {
    /// Returns how many bytes of pinned staging memory a KV cache needs at most on a GPU.
    pub(in crate::store) fn pinned_bytes(opened: &Opened, slot_bytes: usize) -> usize {
        match opened.cufile {
            Some(_) => slot_bytes.saturating_mul(FALLBACK_BUFFERS),
            None => usize::MAX,
        }
    }

    /// Allocates the VRAM slots, registers what cuFile shall use, and checks it on each path.
    ///
    /// Slots: with cuFile as many as `cufile_buffer_size` holds, else as many as there are staging
    /// buffers, half a GiB at most; fewer where the GPU has not so much memory left. KV caches of one
    /// GPU share them, where they are large enough for the chunks.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`] when there is no VRAM for a single slot.
    pub(in crate::store) fn new(
        store: &StoreShared,
        opened: Opened,
        shape: Shape<'_>,
        buffers: usize,
    ) -> Result<Self> {
        let Opened {
            gpu,
            cufile,
            memory,
        } = opened;
        let slot_shape = SlotShape::new(shape.layout, shape.format, shape.blocks);
        let (in_place, refusal) = match &cufile {
            None => (None, None),
            Some(cufile) => match InPlace::new(store, &gpu, cufile, &memory, shape) {
                Ok(in_place) => (Some(in_place), None),
                Err(reason) => (None, Some(reason)),
            },
        };
        let (kind, wanted) = match (&cufile, &in_place) {
            (Some(_), Some(_)) => (Use::Fallback, FALLBACK_SLOTS),
            (Some(_), None) => {
                let count = (store.buffer_mib << 20) / slot_shape.device_bytes();
                (Use::Cufile, count.max(1))
            }
            (None, _) => (Use::Pinned, pinned_slots(slot_shape, buffers).max(1)),
        };
        let (slots, cufile) = match memory.slots(kind, slot_shape) {
            Some(slots) => (slots, cufile),
            None => {
                let wanted = (kind, wanted);
                allocate(store, &gpu, &memory, slot_shape, wanted, buffers, cufile)?
            }
        };
        let in_place = in_place.filter(|_| cufile.is_some());
        let (gpu, timings) = match store.copy_method {
            Some(method) => (gpu.with_method(method)?, Vec::new()),
            None => calibrate(&gpu, &slots, shape)?,
        };
        let side = Self {
            gpu,
            slots,
            cufile,
            in_place,
            late: Arc::default(),
        };
        side.check_mounts(store);
        side.tell(store, buffers, refusal, &timings);
        Ok(side)
    }

    /// Returns the way of chunks on a mount now.
    pub(in crate::store) fn route(&self, mount: &Mount) -> Route {
        match (&self.cufile, &self.in_place) {
            (Some(_), Some(_)) if mount.cufile.is_on() => Route::InPlace,
            (Some(_), None) if mount.cufile.is_on() => Route::Slot,
            _ => Route::Posix,
        }
    }

    /// Returns whether stores that POSIX writes wait in VRAM slots, of which there are then more than
    /// staging buffers: those were made for what falls back only.
    pub(in crate::store) fn stages_in_slots(&self) -> bool {
        self.cufile.is_some() && self.in_place.is_none()
    }

    /// Returns whether the GPU hashes pages.
    pub(in crate::store) fn hashes(&self) -> bool {
        self.gpu.kernels().is_some()
    }

    /// Marks what the serving engine has put on its stream so far.
    ///
    /// # Errors
    /// [`ErrorKind::Gpu`].
    pub(in crate::store) fn mark(&self, compute: ComputeStream) -> Result<Arc<Event>> {
        let stream = self.gpu.compute_stream(compute);
        self.gpu.mark(&stream).map(Arc::new)
    }

    /// Returns the slots that chunks on a route pass.
    pub(in crate::store) fn slots(&self, route: Route) -> &GpuSlots {
        match (route, &self.in_place) {
            (Route::InPlace, Some(in_place)) => &in_place.slots,
            _ => &self.slots,
        }
    }

    /// Takes a slot for a load on a route by cuFile, if one is free.
    pub(in crate::store) fn try_take(&self, route: Route) -> Option<GpuSlot> {
        self.slots(route).try_take(&self.gpu, 0)
    }

    /// Takes a slot for a load on a route by cuFile.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when none came free until `deadline`.
    pub(in crate::store) fn take(&self, route: Route, deadline: Instant) -> Result<GpuSlot> {
        self.slots(route).take(&self.gpu, deadline)
    }

    /// Returns cuFile, on a route that has it.
    pub(super) fn cufile(&self) -> Result<&Arc<Cufile>> {
        let missing = || Error::new(ErrorKind::InvalidArgument, "a route without cuFile");
        self.cufile.as_ref().ok_or_else(missing)
    }

    /// Tries cuFile in this process on each mount where it works in another one.
    fn check_mounts(&self, store: &StoreShared) {
        let Some(cufile) = &self.cufile else { return };
        for mount in store.mounts.iter().filter(|mount| mount.cufile.is_on()) {
            let slots = self.slots(self.route(mount));
            let limit = REGISTER_LIMIT.min(store.wait_limit);
            match cufile.check(&self.gpu, slots, mount, &store.writer, limit) {
                Ok(()) => mount
                    .cufile
                    .turn_on("verified by write, read and compare".into()),
                Err(error) => mount.cufile.turn_off(error.to_string()),
            }
        }
    }

    /// Says what was found and set up: a line for the KV cache, and one for each path.
    fn tell(
        &self,
        store: &StoreShared,
        buffers: usize,
        refusal: Option<String>,
        timings: &[Timing],
    ) {
        let way = match (&self.cufile, &self.in_place) {
            (Some(_), Some(_)) => "blocks read and written in place".to_owned(),
            _ if timings.is_empty() => format!("pieces copied by {}", self.gpu.method()),
            _ => format!("pieces copied by {}", list(timings)),
        };
        let hashed = if self.hashes() { "GPU" } else { "CPU" };
        store.notices.info(Topic::Start, || {
            format!(
                "KV cache on cuda:{}: {} VRAM slots{}, {buffers} pinned staging buffers, {way}, pages \
                 hashed by the {hashed}: {}",
                self.gpu.context().ordinal(),
                self.slots.slot_count(),
                if self.slots.is_registered() { " registered with cuFile" } else { "" },
                self.gpu.reason()
            )
        });
        if let Some(reason) = refusal {
            store.notices.info(Topic::Start, || {
                format!(
                    "KV cache is not read and written in place, but through VRAM slots: {reason}"
                )
            });
        }
        for mount in &store.mounts {
            let path = mount.root.display();
            match mount.cufile.describe() {
                Some((true, reason)) => store.notices.info(Topic::Start, || {
                    format!("{path}: cuFile moves the bytes: {reason}")
                }),
                Some((false, reason)) => store.notices.info(Topic::Start, || {
                    format!("{path}: POSIX moves the bytes, not cuFile: {reason}")
                }),
                None => {}
            }
        }
    }
}

/// Finds out which way of copying pieces is the quickest for a chunk of this KV cache.
fn calibrate(gpu: &Gpu, slots: &GpuSlots, shape: Shape<'_>) -> Result<(Gpu, Vec<Timing>)> {
    let count = shape.blocks.min(shape.layout.block_count());
    let blocks: Vec<usize> = (0..count).collect();
    let plan = TransferPlan::new(shape.layout, &blocks)?;
    gpu.calibrated(slots, &plan, shape.regions, shape.format)
}

/// Says which way was the quickest, and how long each took.
fn list(timings: &[Timing]) -> String {
    let times: Vec<String> = timings
        .iter()
        .map(|timing| format!("{} {:.3} ms", timing.method, timing.milliseconds))
        .collect();
    let best = timings.first().map(|best| best.method.to_string());
    format!("{} ({})", best.unwrap_or_default(), times.join(", "))
}

/// Returns how many slots shall lie before `buffers` staging buffers.
fn pinned_slots(shape: SlotShape, buffers: usize) -> usize {
    let most = (PINNED_SLOTS_BYTES / shape.device_bytes()).max(PINNED_SLOTS_MIN);
    buffers.min(most)
}

/// Allocates slots, registered with cuFile where that is in use; without it if they cannot be.
fn allocate(
    store: &StoreShared,
    gpu: &Gpu,
    memory: &SharedMemory,
    shape: SlotShape,
    (kind, wanted): (Use, usize),
    buffers: usize,
    cufile: Option<Arc<Cufile>>,
) -> Result<(GpuSlots, Option<Arc<Cufile>>)> {
    if let Some(cufile) = cufile {
        let limit = REGISTER_LIMIT.min(store.wait_limit);
        let (driver, device) = (cufile.driver.clone(), gpu.clone());
        let registered = within(limit, "cuFileBufRegister", move || {
            fewer(wanted, |count| {
                GpuSlots::new(&device, shape, count, buffers, Some(&driver))
            })
        });
        match registered.and_then(|slots| slots) {
            Ok(slots) => {
                memory.share_slots(kind, &slots);
                return Ok((slots, Some(cufile)));
            }
            Err(error) => {
                for mount in store.mounts.iter().filter(|mount| mount.cufile.is_on()) {
                    mount.cufile.turn_off(error.to_string());
                }
            }
        }
    }
    if let Some(slots) = memory.slots(Use::Pinned, shape) {
        return Ok((slots, None));
    }
    let count = wanted.min(pinned_slots(shape, buffers));
    let slots = fewer(count, |count| {
        GpuSlots::new(gpu, shape, count, buffers, None)
    })?;
    memory.share_slots(Use::Pinned, &slots);
    Ok((slots, None))
}

/// Makes as many slots as there is memory for, halving their number until there is.
fn fewer(wanted: usize, make: impl Fn(usize) -> Result<GpuSlots>) -> Result<GpuSlots> {
    let mut count = wanted;
    loop {
        match make(count) {
            Ok(slots) => return Ok(slots),
            Err(error) if count == 1 => return Err(error),
            Err(_) => count /= 2,
        }
    }
}
