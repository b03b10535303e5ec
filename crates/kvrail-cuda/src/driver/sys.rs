//! C types and functions of the CUDA driver (cuda.h of CUDA 12 and 13).
#![expect(unsafe_code, reason = "gives functions of a library their C types")]

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::library::functions;

/// `CUdeviceptr_v2`.
pub(crate) type Pointer = u64;
/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`: opaque.
pub(crate) type Handle = *mut c_void;
/// `CUdevice`.
pub(crate) type Device = c_int;

/// `CU_EVENT_DEFAULT`: with timing.
pub(crate) const EVENT_DEFAULT: c_uint = 0;
/// `CU_EVENT_DISABLE_TIMING`: what the driver's documentation recommends where events only order.
pub(crate) const EVENT_UNTIMED: c_uint = 2;
/// `CU_STREAM_NON_BLOCKING`: not ordered with the legacy default stream.
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
pub(crate) const HOST_REGISTER: c_uint = 1 | 2;
/// `CUDA_ERROR_NOT_READY`.
pub(crate) const NOT_READY: c_int = 600;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`: calls of this thread are not refused while others capture.
pub(crate) const CAPTURE_RELAXED: c_uint = 2;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
pub(crate) const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];

/// `CUmemcpyAttributes_v1`: access order, hints of location (type, id) for both ends, flags.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct CopyAttributes {
    pub(crate) order: c_uint,
    pub(crate) source_hint: [c_int; 2],
    pub(crate) target_hint: [c_int; 2],
    pub(crate) flags: c_uint,
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read in stream order. The looser orders let
/// the device read before what was put on the stream earlier is done.
pub(crate) const ORDER_STREAM: c_uint = 1;

functions! {
    /// The driver's functions that kvrail calls.
    Api {
        init = "cuInit": fn(c_uint) -> c_int;
        version = "cuDriverGetVersion": fn(*mut c_int) -> c_int;
        device_count = "cuDeviceGetCount": fn(*mut c_int) -> c_int;
        device = "cuDeviceGet": fn(*mut Device, c_int) -> c_int;
        device_name = "cuDeviceGetName": fn(*mut c_char, c_int, Device) -> c_int;
        device_memory = "cuDeviceTotalMem_v2": fn(*mut usize, Device) -> c_int;
        device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, Device) -> c_int;
        device_bus = "cuDeviceGetPCIBusId": fn(*mut c_char, c_int, Device) -> c_int;
        retain = "cuDevicePrimaryCtxRetain": fn(*mut Handle, Device) -> c_int;
        release = "cuDevicePrimaryCtxRelease_v2": fn(Device) -> c_int;
        push = "cuCtxPushCurrent_v2": fn(Handle) -> c_int;
        pop = "cuCtxPopCurrent_v2": fn(*mut Handle) -> c_int;
        exchange_capture_mode = "cuThreadExchangeStreamCaptureMode": fn(*mut c_uint) -> c_int;
        priorities = "cuCtxGetStreamPriorityRange": fn(*mut c_int, *mut c_int) -> c_int;
        memory_info = "cuMemGetInfo_v2": fn(*mut usize, *mut usize) -> c_int;
        allocate = "cuMemAlloc_v2": fn(*mut Pointer, usize) -> c_int;
        free = "cuMemFree_v2": fn(Pointer) -> c_int;
        pin = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint) -> c_int;
        unpin = "cuMemHostUnregister": fn(*mut c_void) -> c_int;
        pinned_address = "cuMemHostGetDevicePointer_v2": fn(*mut Pointer, *mut c_void, c_uint) -> c_int;
        to_device = "cuMemcpyHtoDAsync_v2": fn(Pointer, *const c_void, usize, Handle) -> c_int;
        to_host = "cuMemcpyDtoHAsync_v2": fn(*mut c_void, Pointer, usize, Handle) -> c_int;
        on_device = "cuMemcpyDtoDAsync_v2": fn(Pointer, Pointer, usize, Handle) -> c_int;
        stream_create = "cuStreamCreateWithPriority": fn(*mut Handle, c_uint, c_int) -> c_int;
        stream_destroy = "cuStreamDestroy_v2": fn(Handle) -> c_int;
        stream_synchronize = "cuStreamSynchronize": fn(Handle) -> c_int;
        stream_wait = "cuStreamWaitEvent": fn(Handle, Handle, c_uint) -> c_int;
        event_create = "cuEventCreate": fn(*mut Handle, c_uint) -> c_int;
        event_record = "cuEventRecord": fn(Handle, Handle) -> c_int;
        event_query = "cuEventQuery": fn(Handle) -> c_int;
        event_elapsed = "cuEventElapsedTime": fn(*mut f32, Handle, Handle) -> c_int;
        event_destroy = "cuEventDestroy_v2": fn(Handle) -> c_int;
        module_load = "cuModuleLoadData": fn(*mut Handle, *const c_void) -> c_int;
        module_unload = "cuModuleUnload": fn(Handle) -> c_int;
        module_function = "cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char) -> c_int;
        launch = "cuLaunchKernel": fn(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
            *mut *mut c_void, *mut *mut c_void
        ) -> c_int;
    }
    optional {
            // CUDA 12.8: (targets, sources, sizes, count, attributes, their starts, number of
            // attributes, where it failed, stream). CUDA 13 dropped the failed index.
            batch = "cuMemcpyBatchAsync": fn(
                *mut Pointer, *mut Pointer, *mut usize, usize, *mut CopyAttributes, *mut usize,
                usize, *mut usize, Handle
            ) -> c_int;
            batch_v2 = "cuMemcpyBatchAsync_v2": fn(
                *const Pointer, *const Pointer, *const usize, usize, *mut CopyAttributes,
                *mut usize, usize, Handle
            ) -> c_int;
    }
}
