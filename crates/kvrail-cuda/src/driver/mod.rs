//! The CUDA driver: devices, contexts, memory, streams and events.

mod context;
mod cuda;
mod memory;
mod stream;
pub(crate) mod sys;

pub use context::{Context, Priority};
pub use cuda::{Cuda, DeviceInfo};
pub use memory::{DeviceMemory, DevicePointer, PinnedRange};
pub use stream::{Event, Stream};
