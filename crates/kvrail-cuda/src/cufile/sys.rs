//! C types and functions of cuFile (cufile.h 1.14 and 1.20).
#![expect(unsafe_code, reason = "gives functions of a library their C types")]

use std::ffi::{c_int, c_uint, c_void};

use crate::library::functions;

/// `CUfileError_t`: the operation's error and the CUDA driver's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) error: c_int,
    pub(crate) cuda: c_int,
}

/// `CUfileHandle_t`: opaque.
pub(crate) type Handle = *mut c_void;

/// `CUfileDescr_t`: a file given by its descriptor. The union in the middle is 8 bytes.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) kind: c_int,
    pub(crate) descriptor: Descriptor,
    pub(crate) operations: *const c_void,
}

/// The union of a file descriptor and a handle of another system.
#[repr(C)]
pub(crate) union Descriptor {
    pub(crate) fd: c_int,
    pub(crate) handle: *mut c_void,
}

impl std::fmt::Debug for Descriptor {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Descriptor")
    }
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(crate) const OPAQUE_FD: c_int = 1;
/// `CUFILEOP_BASE_ERR`: smaller negative results are `-CUfileOpError`.
pub(crate) const BASE_ERROR: isize = 5000;

/// `CUFILE_PARAM_PROPERTIES_MAX_DIRECT_IO_SIZE_KB`, of sizes.
pub(crate) const MAX_DIRECT_IO_SIZE_KB: c_int = 5;
/// `CUFILE_PARAM_PROPERTIES_MAX_DEVICE_PINNED_MEM_SIZE_KB`, of sizes.
pub(crate) const MAX_DEVICE_PINNED_MEM_SIZE_KB: c_int = 8;
/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`, of switches.
pub(crate) const ALLOW_COMPAT_MODE: c_int = 1;
/// `CUFILE_PARAM_USE_PCIP2PDMA`, of switches.
pub(crate) const USE_PCIP2PDMA: c_int = 7;

functions! {
    /// cuFile's functions that kvrail calls.
    Api {
        driver_open = "cuFileDriverOpen": fn() -> Status;
        register_file = "cuFileHandleRegister": fn(*mut Handle, *mut Description) -> Status;
        deregister_file = "cuFileHandleDeregister": fn(Handle) -> ();
        register_buffer = "cuFileBufRegister": fn(*const c_void, usize, c_int) -> Status;
        deregister_buffer = "cuFileBufDeregister": fn(*const c_void) -> Status;
        read = "cuFileRead": fn(Handle, *mut c_void, usize, i64, i64) -> isize;
        write = "cuFileWrite": fn(Handle, *const c_void, usize, i64, i64) -> isize;
    }
    optional {
            // The header renames the first to the second; version 1.0 has only the first.
            driver_close_v2 = "cuFileDriverClose_v2": fn() -> Status;
            driver_close = "cuFileDriverClose": fn() -> Status;
            version = "cuFileGetVersion": fn(*mut c_int) -> Status;
            read_vectored = "cuFileReadv": fn(Handle, *const c_void, usize, i64, c_uint) -> isize;
            write_vectored = "cuFileWritev": fn(Handle, *const c_void, usize, i64, c_uint) -> isize;
            // Since 1.13; only before the driver is opened.
            set_size = "cuFileSetParameterSizeT": fn(c_int, usize) -> Status;
            set_bool = "cuFileSetParameterBool": fn(c_int, bool) -> Status;
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_header() {
        assert_eq!(size_of::<Status>(), 8);
        assert_eq!(size_of::<Description>(), 24);
        assert_eq!(offset_of!(Description, descriptor), 8);
        assert_eq!(offset_of!(Description, operations), 16);
    }
}
