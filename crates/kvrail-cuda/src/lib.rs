//! The CUDA driver and cuFile, found at run time: nothing of CUDA is needed to build or to start.
//!
//! Three layers: `sys` has the C types and tables of function pointers, `result` is the check of
//! each call's code (in [`Error`]), and the public types own what they made and give it back when
//! they are dropped. One binary serves CUDA 12 and 13: symbols that only one of them has are
//! optional, and a library or symbol that is missing is an [`ErrorKind`], never a panic.
//!
//! - [`Cuda`] is the driver; [`Context`], [`Stream`], [`Event`], [`DeviceMemory`] and
//!   [`PinnedRange`] are its objects
//! - [`Kernels`] are kvrail's own kernels, as PTX text that the driver compiles
//! - [`CuFile`] is the library, [`CuFileDriver`] its opened driver, with [`FileHandle`] and
//!   [`RegisteredBuffer`]
//! - [`probe`] tries cuFile in a process of its own, [`system`] reads what the machine says
//!
//! **Why a binding of our own.** cudarc's loader tries neither `libcufile.so.0`, the only name in
//! NVIDIA's wheels, nor paths that a caller gives, and it panics where a library is absent. What is
//! needed here are 40 functions; a table of them is shorter than what would guard against that.

mod cufile;
mod driver;
mod error;
#[cfg(test)]
mod headers;
mod kernels;
mod library;
pub mod probe;
pub mod system;

pub use cufile::{
    CuFile, CuFileDriver, DriverSettings, FileHandle, RegisteredBuffer, RegisteredMemory,
    TRANSFER_BYTES_MAX,
};
pub use driver::{
    Context, Cuda, DeviceInfo, DeviceMemory, DevicePointer, Event, PinnedRange, Priority, Stream,
};
pub use error::{Error, ErrorKind, Result};
pub use kernels::{
    COPY_PIECE_BYTES, CopyDescriptor, GRID_ROWS_MAX, HashDescriptor, Kernels, PAGE_BYTES, Pages,
    PieceGrid, reference,
};
pub use library::LibraryPaths;
