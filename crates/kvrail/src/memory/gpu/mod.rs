//! Chunks in the memory of a GPU: slots of VRAM, and how bytes get in and out of them.
//!
//! - [`Gpu`] is one device: its context, its kernels, its streams
//! - [`GpuSlots`] is the ring of VRAM slots, each with a little pinned memory beside it
//! - [`GpuSlot`] gathers, hashes, copies and scatters, in the order of a stream
//!
//! Nothing here waits for the GPU: work is put on a stream, and an event tells when it is done.

mod calibrate;
mod check;
mod device;
mod frame;
mod hash;
mod hashing;
mod plain;
mod slot;
mod transfer;

pub use calibrate::Timing;
pub use device::{ComputeStream, CopyMethod, Gpu};
pub use hashing::PagesInSlot;
pub use slot::{GpuSlot, GpuSlots, SlotShape, WeakGpuSlots};
