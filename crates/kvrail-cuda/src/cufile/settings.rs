//! What is set before cuFile's driver is opened, whatever `cufile.json` says.
#![expect(unsafe_code, reason = "calls cuFile")]

use super::driver::TRANSFER_BYTES_MAX;
use super::sys::{
    ALLOW_COMPAT_MODE, Api, MAX_DEVICE_PINNED_MEM_SIZE_KB, MAX_DIRECT_IO_SIZE_KB, USE_PCIP2PDMA,
};
use crate::system::{NvidiaFs, SystemView};

/// Settings of ours; a library before 1.13 has no calls for them and keeps its own (the process that
/// tries cuFile has its compatibility mode set by the environment).
///
/// Beside these, transfers of up to 16 MiB, cuFile's largest, and as much registered memory as the
/// device has: a KV cache is most of it, and the `cufile.json` of NVIDIA's packages allows 32 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverSettings {
    /// Whether cuFile may stand in for a direct path that it does not find (its compatibility
    /// mode). Without, what would be copied by the CPU is an error, so that success means a direct
    /// path.
    pub allow_compatibility: bool,
    /// Whether cuFile uses the kernel's own P2PDMA. It does not unless told so (GDS support for
    /// NVMe, NVIDIA), and where there is no nvidia-fs it has no other direct path. `false` leaves
    /// the user's choice.
    pub use_p2pdma: bool,
}

impl DriverSettings {
    /// Returns the settings for a machine: where there is no nvidia-fs, with P2PDMA.
    pub fn for_machine(view: &SystemView, allow_compatibility: bool) -> Self {
        Self {
            allow_compatibility,
            use_p2pdma: NvidiaFs::read(view).is_none(),
        }
    }

    /// Sets them. The library refuses when its driver is open already, by another part of the
    /// process: the settings stay as they are then, and the transfers show what it does.
    pub(super) fn apply(self, api: &Api, device_bytes: Option<usize>) {
        if let Some(set) = api.set_bool {
            // SAFETY: the arguments are numbers.
            let _ = unsafe { set(ALLOW_COMPAT_MODE, self.allow_compatibility) };
            if self.use_p2pdma {
                // SAFETY: as above.
                let _ = unsafe { set(USE_PCIP2PDMA, true) };
            }
        }
        if let Some(set) = api.set_size {
            // SAFETY: as above.
            let _ = unsafe { set(MAX_DIRECT_IO_SIZE_KB, TRANSFER_BYTES_MAX >> 10) };
            if let Some(bytes) = device_bytes {
                // SAFETY: as above.
                let _ = unsafe { set(MAX_DEVICE_PINNED_MEM_SIZE_KB, bytes >> 10) };
            }
        }
    }
}
