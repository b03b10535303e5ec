//! What NVIDIA's own libcufile asks of the driver beyond what kvrail does, so that it runs on the
//! memory of this one.
//!
//! It looks all of its functions up when it is opened and refuses a driver that lacks one. Those
//! that it calls for CUDA graphs, IPC and work on streams are there and say "not supported".
#![allow(
    clippy::missing_safety_doc,
    missing_docs,
    reason = "the functions and their contracts are those of cuda.h"
)]

use std::ffi::{c_char, c_int, c_uint, c_void};

use mock_script::Action;

use crate::control::enter;
use crate::driver::{
    Handle, INVALID, NO_CONTEXT, cuStreamCreateWithPriority, handle, put, put_copy,
};
use crate::memory::memory;
use crate::objects::{count, current, pop, push};
use crate::streams::{Work, streams};
use crate::work;

/// `CUDA_ERROR_NOT_SUPPORTED`.
const NOT_SUPPORTED: c_int = 801;

/// `CU_POINTER_ATTRIBUTE_*`, and two values of `CUmemorytype`.
const CONTEXT: c_int = 1;
const MEMORY_TYPE: c_int = 2;
const DEVICE_POINTER: c_int = 3;
const HOST_POINTER: c_int = 4;
const BUFFER_ID: c_int = 7;
const IS_MANAGED: c_int = 8;
const DEVICE_ORDINAL: c_int = 9;
const HOST_MEMORY: c_uint = 1;
const DEVICE_MEMORY: c_uint = 2;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    value: *mut c_void,
    attribute: c_int,
    address: u64,
) -> c_int {
    begin!("cuPointerGetAttribute");
    let memory = memory();
    let device = memory.device_of(address);
    let pinned = memory.is_pinned(address);
    // As the driver, which knows nothing of host memory that was not registered with it.
    let Some(owner) = device.or(pinned.then_some(0)) else {
        return INVALID;
    };
    // SAFETY: passed on; each attribute's type is what cuda.h says.
    unsafe {
        match attribute {
            CONTEXT => put(value.cast(), handle(owner + 1)),
            MEMORY_TYPE if pinned => put(value.cast(), HOST_MEMORY),
            MEMORY_TYPE => put(value.cast(), DEVICE_MEMORY),
            DEVICE_POINTER => put(value.cast(), address),
            HOST_POINTER if pinned => put(value.cast(), address),
            BUFFER_ID => put(value.cast(), memory.buffer_id(address)),
            IS_MANAGED => put(value.cast(), 0_u32),
            DEVICE_ORDINAL => put(value.cast(), c_int::try_from(owner).unwrap_or(0)),
            _ => INVALID,
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttributes(
    number: c_uint,
    attributes: *mut c_int,
    values: *mut *mut c_void,
    address: u64,
) -> c_int {
    begin!("cuPointerGetAttributes");
    for index in 0..number as usize {
        // SAFETY: both lists have `number` entries. As the driver, which leaves what it does not
        // know.
        unsafe { cuPointerGetAttribute(*values.add(index), *attributes.add(index), address) };
    }
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuPointerSetAttribute(
    _value: *const c_void,
    _attribute: c_int,
    _address: u64,
) -> c_int {
    begin!("cuPointerSetAttribute");
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(
    start: *mut u64,
    bytes: *mut usize,
    address: u64,
) -> c_int {
    begin!("cuMemGetAddressRange", _device);
    let Some((first, length)) = memory().range(address) else {
        return INVALID;
    };
    // SAFETY: passed on.
    unsafe { put(start, first) | put(bytes, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    address: *mut u64,
    host: *mut c_void,
    _flags: c_uint,
) -> c_int {
    begin!("cuMemHostGetDevicePointer");
    let host = host.expose_provenance() as u64;
    if !memory().is_pinned(host) {
        return INVALID;
    }
    // SAFETY: passed on.
    unsafe { put(address, host) }
}

/// A copy that is done when the call returns.
fn copy_now(action: Option<Action>, target: u64, source: u64, bytes: usize) -> c_int {
    // The default stream waits for the others.
    streams().finish_all();
    work::perform(Work::Copy {
        action,
        target,
        source,
        bytes,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy(target: u64, source: u64, bytes: usize) -> c_int {
    let action = begin!("cuMemcpy");
    match current() {
        Some(_) => copy_now(action, target, source, bytes),
        None => NO_CONTEXT,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(target: *mut c_void, source: u64, bytes: usize) -> c_int {
    cuMemcpy(target.expose_provenance() as u64, source, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(target: u64, source: *const c_void, bytes: usize) -> c_int {
    cuMemcpy(target, source.expose_provenance() as u64, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyAsync(target: u64, source: u64, bytes: usize, stream: Handle) -> c_int {
    let action = begin!("cuMemcpyAsync");
    if current().is_none() {
        return NO_CONTEXT;
    }
    put_copy(stream, action, target, source, bytes)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> c_int {
    begin!("cuCtxGetCurrent");
    let number = current().map_or(0, |device| device + 1);
    // SAFETY: passed on.
    unsafe { put(context, handle(number)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> c_int {
    begin!("cuCtxSetCurrent");
    pop();
    if let Some(device) = context.addr().checked_sub(1) {
        push(device);
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> c_int {
    begin!("cuCtxGetDevice", current);
    // SAFETY: passed on.
    unsafe { put(device, c_int::try_from(current).unwrap_or(0)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(
    context: *mut Handle,
    _flags: c_uint,
    device: c_int,
) -> c_int {
    begin!("cuCtxCreate");
    let device = usize::try_from(device).unwrap_or(0);
    count(1);
    push(device);
    // SAFETY: passed on.
    unsafe { put(context, handle(device + 1)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(context: Handle) -> c_int {
    begin!("cuCtxDestroy");
    count(-1);
    if current().is_some_and(|device| device + 1 == context.addr()) {
        pop();
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(
    can: *mut c_int,
    _device: c_int,
    _peer: c_int,
) -> c_int {
    begin!("cuDeviceCanAccessPeer");
    // SAFETY: passed on.
    unsafe { put(can, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(id: *mut [u8; 16], device: c_int) -> c_int {
    begin!("cuDeviceGetUuid");
    let number = u8::try_from(device).unwrap_or(0);
    // SAFETY: passed on.
    unsafe { put(id, [number + 1; 16]) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    start: *mut *mut c_void,
    bytes: usize,
    _flags: c_uint,
) -> c_int {
    begin!("cuMemHostAlloc", _device);
    match memory().allocate_host(bytes) {
        // SAFETY: passed on.
        Some(address) => unsafe { put(start, address) },
        None => INVALID,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(start: *mut *mut c_void, bytes: usize) -> c_int {
    // SAFETY: passed on.
    unsafe { cuMemHostAlloc(start, bytes, 0) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(start: *mut c_void) -> c_int {
    begin!("cuMemFreeHost", _device);
    streams().finish_all();
    if memory().free_host(start) {
        0
    } else {
        INVALID
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, flags: c_uint) -> c_int {
    // SAFETY: passed on.
    unsafe { cuStreamCreateWithPriority(stream, flags, 0) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> c_int {
    begin!("cuEventSynchronize", _device);
    streams().finish_event(event.addr())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(_error: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: passed on.
    unsafe { put(text, c"an error of the mock".as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: passed on.
    unsafe { cuGetErrorName(error, text) }
}

/// Functions that are looked up, and called by parts of libcufile that kvrail does not use.
macro_rules! unsupported {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name() -> c_int {
                enter(stringify!($name));
                NOT_SUPPORTED
            }
        )*
    };
}

unsupported! {
    cuCtxEnablePeerAccess
    cuGetExportTable
    cuIpcCloseMemHandle
    cuIpcGetEventHandle
    cuIpcGetMemHandle
    cuIpcOpenEventHandle
    cuIpcOpenMemHandle_v2
    cuLaunchHostFunc
    cuMemGetHandleForAddressRange
    cuMemAllocManaged
    cuMemcpyPeer
    cuMemcpyPeerAsync
    cuMemsetD8Async
    cuMemsetD8_v2
    cuStreamWaitValue32
    cuStreamWaitValue32_v2
    cuStreamWriteValue32
    cuStreamWriteValue32_v2
}
