//! The one place where an address from Python becomes memory of the library.

#![expect(
    unsafe_code,
    reason = "an address that Python passes is memory only by its promise"
)]

use std::any::Any;
use std::sync::Arc;

use kvrail::{ComputeStream, Device, Region};
use pyo3::prelude::*;

/// Makes a region on `device` of each `(address, bytes)`; all of them keep `owner` alive.
///
/// The last region may go away on an I/O thread that does not hold the GIL; the reference to
/// `owner` is then given back when this process next enters Python through this module.
///
/// # Errors
/// Whatever the library refuses: a null address, no bytes, an end beyond the address space.
pub(crate) fn regions(
    spans: &[(usize, usize)],
    device: Device,
    owner: Py<PyAny>,
) -> kvrail::Result<Vec<Region>> {
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(owner);
    spans
        .iter()
        .map(|(address, bytes)| {
            // SAFETY: the caller of `Store.attach` promises that `owner` keeps each span valid
            // for reads and writes while it lives, and the region holds a reference to `owner`.
            unsafe { Region::from_raw(*address, *bytes, device, Arc::clone(&owner)) }
        })
        .collect()
}

/// Takes the number of a CUDA stream.
pub(crate) fn compute_stream(handle: usize) -> ComputeStream {
    // SAFETY: the caller of `KvCache.store` or `load` promises that it is a live stream of the device.
    unsafe { ComputeStream::from_raw(handle) }
}
