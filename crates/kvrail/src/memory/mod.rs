//! Memory that chunks come from and go to: regions of the KV cache, and staging buffers.
//!
//! This is one of the two modules of the library with unsafe code: it turns addresses into bytes.
//! Everything it hands out is bounds-checked and owned: a region keeps its owner alive, a staging
//! range belongs to exactly one holder and goes back to its pool when the last part is dropped.

mod arena;
mod byte_lock;
mod copy;
mod file_use;
mod gpu;
mod mapping;
mod region;
mod registered;
mod shared_mapping;
mod shared_slots;
mod staging;
mod streaming;

pub use arena::{Arena, DeviceArena, HostArena};
pub use copy::{Scatter, gather};
pub use file_use::FileUse;
pub use gpu::{
    ComputeStream, CopyMethod, Gpu, GpuSlot, GpuSlots, PagesInSlot, SlotShape, Timing, WeakGpuSlots,
};
pub use region::{Device, Region};
pub use registered::RegisteredRegion;
pub use shared_slots::{SharedSlots, SlotRead, SlotWrite, SlotsLayout};
pub use staging::{StagingPool, StagingRange};
