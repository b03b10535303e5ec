//! The driver's functions for kernels: modules, and launches of those that kvrail has.
#![allow(
    clippy::missing_safety_doc,
    missing_docs,
    reason = "the functions and their contracts are those of cuda.h"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use kvrail_cuda::{Pages, PieceGrid};
use mock_script::Action;

use crate::control::enter;
use crate::driver::{
    CAPTURE_UNSUPPORTED, Handle, INVALID_HANDLE, NO_CONTEXT, handle, put, put_work,
};
use crate::objects::{count, current, is_refused};
use crate::streams::{Pieces, Work};

const NOT_FOUND: c_int = 500;

const COPY: &str = "kvrail_copy";
const HASH: &str = "kvrail_hash_pages";
const GATHER: &str = "kvrail_gather_hashed";
const GATHER_GRID: &str = "kvrail_gather_grid";
const SCATTER_GRID: &str = "kvrail_scatter_grid";
/// The kernels; a function's handle is its place here and one, and `PER_DEVICE` for each device
/// before that of the context that its module was loaded in.
const KERNELS: [&str; 6] = [
    COPY,
    HASH,
    GATHER,
    "kvrail_scatter_verified",
    GATHER_GRID,
    SCATTER_GRID,
];
const PER_DEVICE: usize = 16;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> c_int {
    begin_unsafe!("cuModuleLoadData", device);
    // SAFETY: PTX ends with a zero.
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy();
    if !text.contains(".visible .entry kvrail_copy(") {
        return 218;
    }
    count(1);
    // SAFETY: passed on.
    unsafe { put(module, handle(device + 1)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_module: Handle) -> c_int {
    begin_unsafe!("cuModuleUnload", _device);
    count(-1);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> c_int {
    begin!("cuModuleGetFunction", _device);
    let Some(device) = module.addr().checked_sub(1) else {
        return INVALID_HANDLE;
    };
    // SAFETY: the name ends with a zero.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes();
    let Some(index) = KERNELS.iter().position(|kernel| kernel.as_bytes() == name) else {
        return NOT_FOUND;
    };
    // SAFETY: passed on.
    unsafe { put(function, handle(device * PER_DEVICE + index + 1)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared: c_uint,
    stream: Handle,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_int {
    let action = begin!("cuLaunchKernel");
    let Some(device) = current() else {
        return NO_CONTEXT;
    };
    // SAFETY: arguments of 8 bytes: two of the first kernel, four of the second, six of the next two,
    // and five of the others but for their first one.
    let argument = |index| unsafe { **arguments.add(index).cast::<*const u64>() };
    let Some(kernel) = function
        .addr()
        .checked_sub(device * PER_DEVICE + 1)
        .and_then(|index| KERNELS.get(index))
    else {
        return INVALID_HANDLE;
    };
    // A script may also name the kernel.
    let action = match (action, enter(kernel)) {
        (_, Some(Action::Error(code))) => return code,
        (action, of_kernel) => action.or(of_kernel),
    };
    let work = match *kernel {
        COPY => Work::CopyKernel {
            action,
            descriptors: argument(0),
            number: argument(1) as usize,
        },
        HASH => Work::HashKernel {
            action,
            descriptors: argument(0),
            number: argument(1) as usize,
            hashes: argument(3),
        },
        GATHER_GRID | SCATTER_GRID => Work::PagesKernel {
            action,
            gathers: *kernel == GATHER_GRID,
            // SAFETY: the first argument of these is a grid.
            pieces: Pieces::Grid(Box::new(unsafe { **arguments.cast::<*const PieceGrid>() })),
            pages: Pages {
                address: argument(1),
                count: argument(2) as usize,
                hashes: argument(3),
            },
            last: argument(4),
        },
        _ => Work::PagesKernel {
            action,
            gathers: *kernel == GATHER,
            pieces: Pieces::List {
                descriptors: argument(0),
                number: argument(1) as usize,
            },
            pages: Pages {
                address: argument(2),
                count: argument(3) as usize,
                hashes: argument(4),
            },
            last: argument(5),
        },
    };
    put_work(stream, work)
}
