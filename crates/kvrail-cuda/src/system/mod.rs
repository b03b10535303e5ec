//! What the machine says about GPUs and storage, read from `/proc`, `/sys`, `/run` and `/dev`.
//!
//! Everything is a function of a [`SystemView`], a folder that holds those trees, so that tests
//! give trees of machines that are not at hand. Nothing here loads a library, opens a device or
//! writes. What cannot be read is `None`, never an error: odd trees are the normal case in
//! containers.
//!
//! - [`NvidiaDriver`], [`Gpu`] and [`NvidiaFs`] are what NVIDIA's kernel modules tell
//! - [`P2pdma`] is whether the kernel can move bytes between NVMe and GPU without nvidia-fs
//! - [`Mount`] and [`BlockDevice`] are what lies below a directory
//! - [`cufile_guards`] says whether cuFile may be touched at all

mod container;
mod device;
mod driver;
mod gpu;
mod guard;
mod kernel;
mod mount;
mod nvidia_fs;
mod p2pdma;
mod refusal;
mod view;

#[cfg(test)]
mod tests;

pub use container::container_evidence;
pub use device::{BlockDevice, DeviceKind};
pub use driver::NvidiaDriver;
pub use gpu::Gpu;
pub use guard::{cufile_guards, machine_guards, mount_guards};
pub use kernel::{KernelRelease, has_p2pdma_support};
pub use mount::{DeviceNumber, DirectIoAlignment, Mount, direct_io_alignment};
pub use nvidia_fs::NvidiaFs;
pub use p2pdma::P2pdma;
pub use refusal::{Refusal, RefusalKind};
pub use view::SystemView;
