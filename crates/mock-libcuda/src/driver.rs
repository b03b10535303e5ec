//! The driver's functions, but for those of kernels.
#![allow(
    clippy::missing_safety_doc,
    missing_docs,
    reason = "the functions and their contracts are those of cuda.h"
)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr;

use mock_script::Action;

use crate::control::enter;
use crate::memory::{device_limit, memory};
use crate::objects::{count, current, device_count, exchange_capture_mode, is_refused, pop, push};
use crate::streams::{Work, streams};

pub(crate) type Handle = *mut c_void;

pub(crate) const INVALID: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 101;
pub(crate) const NO_CONTEXT: c_int = 201;
/// `CUDA_ERROR_INVALID_HANDLE`: of another context, or of nothing that is alive.
pub(crate) const INVALID_HANDLE: c_int = 400;
const NOT_READY: c_int = 600;
const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED`.
pub(crate) const CAPTURE_UNSUPPORTED: c_int = 900;

/// Counts the call; returns what the script wants instead of the work.
macro_rules! begin {
    ($name:literal) => {
        match enter($name) {
            Some(Action::Error(code)) => return code,
            action => action,
        }
    };
    ($name:literal, $device:ident) => {
        begin!($name);
        let Some($device) = current() else {
            return NO_CONTEXT;
        };
    };
}

/// As `begin`, for a call that would disturb a capture (CUDA programming guide: "prohibited and
/// unhandled operations").
macro_rules! begin_unsafe {
    ($name:literal, $device:ident) => {
        begin!($name, $device);
        if is_refused() {
            return CAPTURE_UNSUPPORTED;
        }
    };
}

/// Writes a result, if there is room for it.
pub(crate) unsafe fn put<T>(target: *mut T, value: T) -> c_int {
    if target.is_null() {
        return INVALID;
    }
    // SAFETY: the caller's pointer, not null.
    unsafe { target.write(value) };
    0
}

unsafe fn put_text(target: *mut c_char, room: c_int, text: &str) -> c_int {
    let room = usize::try_from(room).unwrap_or(0);
    if target.is_null() || room <= text.len() {
        return INVALID;
    }
    // SAFETY: there is room for the text and its zero.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr().cast(), target, text.len()) };
    // SAFETY: as above.
    unsafe { target.add(text.len()).write(0) };
    0
}

/// A handle that means nothing but "number `value`".
pub(crate) fn handle(value: usize) -> Handle {
    ptr::without_provenance_mut(value)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    begin!("cuInit");
    if device_count() == 0 { 100 } else { 0 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    begin!("cuDriverGetVersion");
    // SAFETY: passed on.
    unsafe { put(version, 12_080) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(number: *mut c_int) -> c_int {
    begin!("cuDeviceGetCount");
    // SAFETY: passed on.
    unsafe { put(number, c_int::try_from(device_count()).unwrap_or(0)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    begin!("cuDeviceGet");
    if usize::try_from(ordinal).is_ok_and(|ordinal| ordinal < device_count()) {
        // SAFETY: passed on.
        return unsafe { put(device, ordinal) };
    }
    NO_DEVICE
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, _device: c_int) -> c_int {
    begin!("cuDeviceGetName");
    // SAFETY: passed on.
    unsafe { put_text(name, room, "Mock GPU") }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, room: c_int, device: c_int) -> c_int {
    begin!("cuDeviceGetPCIBusId");
    // SAFETY: passed on.
    unsafe { put_text(id, room, &format!("0000:{:02x}:00.0", device + 1)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    begin!("cuDeviceTotalMem");
    // SAFETY: passed on.
    unsafe { put(bytes, device_limit()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> c_int {
    begin!("cuDeviceGetAttribute");
    let known = match attribute {
        75 => 9,
        76 => 0,
        // PCI bus; device and domain.
        33 => device + 1,
        34 | 50 => 0,
        // Compute mode; memory operations of streams, GPUDirect RDMA and DMA-BUF.
        20 | 92 | 116 | 124 => 0,
        _ => return INVALID,
    };
    // SAFETY: passed on.
    unsafe { put(value, known) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> c_int {
    begin!("cuDevicePrimaryCtxRetain");
    count(1);
    // The handle is the device's number and one: never null.
    // SAFETY: passed on.
    unsafe { put(context, handle(usize::try_from(device).unwrap_or(0) + 1)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    begin!("cuDevicePrimaryCtxRelease");
    count(-1);
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> c_int {
    begin!("cuCtxPushCurrent");
    match context.addr().checked_sub(1) {
        Some(device) => {
            push(device);
            0
        }
        None => NO_CONTEXT,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> c_int {
    begin!("cuCtxPopCurrent");
    match pop() {
        // SAFETY: passed on.
        Some(device) => unsafe { put(context, handle(device + 1)) },
        None => NO_CONTEXT,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) -> c_int {
    begin!("cuThreadExchangeStreamCaptureMode");
    // SAFETY: the caller's pointer is to the mode that it wants.
    let before = exchange_capture_mode(unsafe { *mode });
    // SAFETY: passed on.
    unsafe { put(mode, before) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(
    least: *mut c_int,
    greatest: *mut c_int,
) -> c_int {
    begin!("cuCtxGetStreamPriorityRange", _device);
    // SAFETY: passed on.
    let first = unsafe { put(least, 0) };
    // SAFETY: passed on.
    first | unsafe { put(greatest, -5) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    begin!("cuMemGetInfo", device);
    // SAFETY: passed on.
    let first = unsafe { put(free, device_limit() - memory().used(device)) };
    // SAFETY: passed on.
    first | unsafe { put(total, device_limit()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    begin_unsafe!("cuMemAlloc", device);
    match memory().allocate(device, bytes) {
        // SAFETY: passed on.
        Some(start) => unsafe { put(address, start) },
        None => OUT_OF_MEMORY,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    begin_unsafe!("cuMemFree", _device);
    // Freeing waits for the device.
    streams().finish_all();
    if memory().free(address) { 0 } else { INVALID }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(start: *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    begin_unsafe!("cuMemHostRegister", _device);
    match memory().pinned.insert(start.expose_provenance(), bytes) {
        None => 0,
        Some(_) => 712,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(start: *mut c_void) -> c_int {
    begin_unsafe!("cuMemHostUnregister", _device);
    match memory().pinned.remove(&start.expose_provenance()) {
        Some(_) => 0,
        None => 713,
    }
}

/// Puts a copy on a stream.
pub(crate) fn put_copy(
    stream: Handle,
    action: Option<Action>,
    target: u64,
    source: u64,
    bytes: usize,
) -> c_int {
    let copy = Work::Copy {
        action,
        target,
        source,
        bytes,
    };
    put_work(stream, copy)
}

/// Puts work on a stream of the current context.
pub(crate) fn put_work(stream: Handle, work: Work) -> c_int {
    let Some(device) = current() else {
        return NO_CONTEXT;
    };
    let mut streams = streams();
    if !streams.is_of(stream.addr(), device) {
        return INVALID_HANDLE;
    }
    streams.push(stream.addr(), work);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    target: u64,
    source: *const c_void,
    bytes: usize,
    stream: Handle,
) -> c_int {
    let action = begin!("cuMemcpyHtoDAsync");
    put_copy(
        stream,
        action,
        target,
        source.expose_provenance() as u64,
        bytes,
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    target: *mut c_void,
    source: u64,
    bytes: usize,
    stream: Handle,
) -> c_int {
    let action = begin!("cuMemcpyDtoHAsync");
    put_copy(
        stream,
        action,
        target.expose_provenance() as u64,
        source,
        bytes,
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    target: u64,
    source: u64,
    bytes: usize,
    stream: Handle,
) -> c_int {
    let action = begin!("cuMemcpyDtoDAsync");
    put_copy(stream, action, target, source, bytes)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyBatchAsync(
    targets: *mut u64,
    sources: *mut u64,
    bytes: *mut usize,
    number: usize,
    _attributes: *mut c_void,
    _starts: *mut usize,
    _attribute_count: usize,
    _failed_at: *mut usize,
    stream: Handle,
) -> c_int {
    let action = begin!("cuMemcpyBatchAsync");
    let Some(_) = current() else {
        return NO_CONTEXT;
    };
    // As documented: not on the legacy default stream.
    if stream.is_null() {
        return INVALID;
    }
    for index in 0..number {
        // SAFETY: the lists have `number` entries.
        let (target, source) = unsafe { (*targets.add(index), *sources.add(index)) };
        // SAFETY: as above.
        let length = unsafe { *bytes.add(index) };
        let code = put_copy(stream, action, target, source, length);
        if code != 0 {
            return code;
        }
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    _flags: c_uint,
    _priority: c_int,
) -> c_int {
    begin!("cuStreamCreateWithPriority", device);
    count(1);
    // SAFETY: passed on.
    unsafe { put(stream, handle(streams().handle(device))) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> c_int {
    begin!("cuStreamDestroy", _device);
    if !streams().forget(stream.addr()) {
        return INVALID_HANDLE;
    }
    count(-1);
    streams().forget_stream(stream.addr());
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> c_int {
    begin_unsafe!("cuStreamSynchronize", device);
    if !streams().is_of(stream.addr(), device) {
        return INVALID_HANDLE;
    }
    streams().finish(stream.addr())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> c_int {
    begin!("cuStreamWaitEvent", device);
    let mut streams = streams();
    if !streams.is_of(stream.addr(), device) || !streams.is_event(event.addr()) {
        return INVALID_HANDLE;
    }
    streams.wait(stream.addr(), event.addr());
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, flags: c_uint) -> c_int {
    begin!("cuEventCreate", device);
    count(1);
    let created = streams().event(device, flags & EVENT_DISABLE_TIMING == 0);
    // SAFETY: passed on.
    unsafe { put(event, handle(created)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> c_int {
    begin!("cuEventRecord", device);
    let mut streams = streams();
    if ![event, stream]
        .iter()
        .all(|one| streams.is_of(one.addr(), device))
    {
        return INVALID_HANDLE;
    }
    streams.record(event.addr(), stream.addr());
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> c_int {
    begin_unsafe!("cuEventQuery", _device);
    if !streams().is_event(event.addr()) {
        return INVALID_HANDLE;
    }
    streams().query(event.addr()).unwrap_or(NOT_READY)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(time: *mut f32, from: Handle, to: Handle) -> c_int {
    begin!("cuEventElapsedTime", _device);
    if ![from, to].iter().all(|one| streams().is_timed(one.addr())) {
        return INVALID_HANDLE;
    }
    match streams().elapsed(from.addr(), to.addr()) {
        // SAFETY: passed on.
        Some(milliseconds) => unsafe { put(time, milliseconds) },
        None => NOT_READY,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> c_int {
    begin!("cuEventDestroy", _device);
    if !streams().forget(event.addr()) {
        return INVALID_HANDLE;
    }
    count(-1);
    0
}
