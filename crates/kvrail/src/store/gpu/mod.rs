//! KV cache in the memory of a GPU.
//!
//! Three ways for a chunk, chosen for each KV cache and path (see [`Route`]):
//! - `pinned`: a VRAM slot, one copy over PCIe, a pinned staging buffer, the posix engine
//! - `slot_image`: a VRAM slot that cuFile writes to the file and reads from it
//! - `in_place`: cuFile reads and writes the blocks themselves; no copy
//!
//! On all of them the GPU hashes, so the CPU touches no payload. `choice` finds out what a machine
//! and its mounts can do, `state` keeps how cuFile fares on a mount, `side` is what an attached KV
//! cache has, `shared_memory` what all of them have together, `devices` the GPUs of a store.

mod choice;
mod cufile;
mod devices;
mod in_place;
mod late_buffers;
mod pinned;
mod shared_memory;
mod side;
mod slot_image;
mod state;

pub(super) use choice::CufileWish;
pub(super) use devices::{Gpus, Opened};
pub(super) use in_place::{InPlaceFailure, InPlaceImage};
pub(super) use late_buffers::LateBuffers;
pub use side::Route;
pub(super) use side::{GpuSide, Shape};
pub(super) use slot_image::SlotImage;
pub(super) use state::CufileState;
