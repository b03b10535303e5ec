//! cuFile's functions, on real files.
#![allow(
    clippy::missing_safety_doc,
    missing_docs,
    reason = "the functions and their contracts are those of cufile.h"
)]

use std::ffi::{c_int, c_uint, c_void};

use mock_script::Action;

use crate::control::enter;
use crate::cuda::{has_context, translate};
use crate::registry::registry;

/// `CUfileError_t`.
#[repr(C)]
pub struct Status {
    error: c_int,
    cuda: c_int,
}

/// `CUfileDescr_t`, with the descriptor in the low half of its union.
#[repr(C)]
pub struct Description {
    kind: c_int,
    fd: c_int,
    union: u64,
    operations: *const c_void,
}

const NO_NVIDIA_FS: c_int = 5001;
/// Switches of `CUFileBoolConfigParameter_t`.
const ALLOW_COMPAT_MODE: c_int = 1;
const USE_PCIP2PDMA: c_int = 7;
/// `CU_FILE_CUDA_DRIVER_ERROR`, and `CUDA_ERROR_INVALID_CONTEXT` beside it.
const CUDA_ERROR: c_int = 5011;
const INVALID_CONTEXT: c_int = 201;
const OPEN_FLAGS: c_int = 5019;
const UNKNOWN_MEMORY: c_int = 5012;
const OUT_OF_RANGE: c_int = 5014;
const REGISTERED_BUFFER: c_int = 5023;
const UNKNOWN_BUFFER: c_int = 5024;
const UNKNOWN_FILE: c_int = 5027;
const REGISTERED_FILE: c_int = 5028;
const INTERNAL: c_int = 5030;
/// Alignment that O_DIRECT needs of memory, offset and length.
const ALIGNMENT: usize = 4096;

fn status(error: c_int) -> Status {
    Status { error, cuda: 0 }
}

macro_rules! begin {
    ($name:literal) => {
        if let Some(Action::Error(code)) = enter($name) {
            return status(code);
        }
    };
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverOpen() -> Status {
    begin!("cuFileDriverOpen");
    let mut registry = registry();
    let is_on = |switch| registry.switches.get(&switch).copied();
    let only_p2pdma = std::env::var_os("KVRAIL_MOCK_ONLY_P2PDMA").is_some();
    if only_p2pdma && is_on(ALLOW_COMPAT_MODE) == Some(false) && is_on(USE_PCIP2PDMA) != Some(true)
    {
        return status(NO_NVIDIA_FS);
    }
    registry.open += 1;
    registry.process = std::process::id();
    status(0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverClose_v2() -> Status {
    begin!("cuFileDriverClose");
    registry().open -= 1;
    status(0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileGetVersion(version: *mut c_int) -> Status {
    begin!("cuFileGetVersion");
    // SAFETY: the caller's pointer.
    unsafe { version.write(1200) };
    status(0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileHandleRegister(
    handle: *mut *mut c_void,
    description: *mut Description,
) -> Status {
    begin!("cuFileHandleRegister");
    // SAFETY: the caller's pointer. The descriptor is the low half of the union.
    let fd = unsafe { (*description).union } as u32 as c_int;
    let mut registry = registry();
    if registry.open <= 0 || registry.process != std::process::id() {
        return status(INTERNAL);
    }
    if registry.files.values().any(|other| *other == fd) {
        return status(REGISTERED_FILE);
    }
    // As the real one (`real_cufile.rs` compares).
    let refused = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_APPEND;
    // SAFETY: asks for the flags of the caller's descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags & refused != 0 {
        return status(OPEN_FLAGS);
    }
    let number = registry.next;
    registry.next += 1;
    registry.files.insert(number, fd);
    // SAFETY: the caller's pointer.
    unsafe { handle.write(std::ptr::without_provenance_mut(number)) };
    status(0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleDeregister(handle: *mut c_void) {
    let _ = enter("cuFileHandleDeregister");
    registry().files.remove(&handle.addr());
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufRegister(start: *const c_void, bytes: usize, _flags: c_int) -> Status {
    begin!("cuFileBufRegister");
    // As the real one (`real_cufile.rs` compares).
    if !has_context() {
        return Status {
            error: CUDA_ERROR,
            cuda: INVALID_CONTEXT,
        };
    }
    let address = start.addr() as u64;
    if translate(address, bytes).is_null() {
        return status(UNKNOWN_MEMORY);
    }
    match registry().buffers.insert(address, bytes) {
        None => status(0),
        Some(_) => status(REGISTERED_BUFFER),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufDeregister(start: *const c_void) -> Status {
    begin!("cuFileBufDeregister");
    match registry().buffers.remove(&(start.addr() as u64)) {
        Some(_) => status(0),
        None => status(UNKNOWN_BUFFER),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileRead(
    handle: *mut c_void,
    base: *mut c_void,
    bytes: usize,
    file_offset: i64,
    buffer_offset: i64,
) -> isize {
    transfer(
        enter("cuFileRead"),
        handle,
        base.addr() as u64,
        bytes,
        file_offset,
        buffer_offset,
        false,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileWrite(
    handle: *mut c_void,
    base: *const c_void,
    bytes: usize,
    file_offset: i64,
    buffer_offset: i64,
) -> isize {
    transfer(
        enter("cuFileWrite"),
        handle,
        base.addr() as u64,
        bytes,
        file_offset,
        buffer_offset,
        true,
    )
}

/// `struct iovec` of POSIX, with the address in device memory.
#[repr(C)]
pub struct Piece {
    address: u64,
    bytes: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileReadv(
    handle: *mut c_void,
    pieces: *const Piece,
    count: usize,
    file_offset: i64,
    _flags: c_uint,
) -> isize {
    // SAFETY: the caller's list.
    let pieces = unsafe { std::slice::from_raw_parts(pieces, count) };
    vectored(enter("cuFileReadv"), handle, pieces, file_offset, false)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileWritev(
    handle: *mut c_void,
    pieces: *const Piece,
    count: usize,
    file_offset: i64,
    _flags: c_uint,
) -> isize {
    // SAFETY: the caller's list.
    let pieces = unsafe { std::slice::from_raw_parts(pieces, count) };
    vectored(enter("cuFileWritev"), handle, pieces, file_offset, true)
}

/// Moves pieces that lie in registered memory, one behind the other in the file.
fn vectored(
    action: Option<Action>,
    handle: *mut c_void,
    pieces: &[Piece],
    file_offset: i64,
    write: bool,
) -> isize {
    let mut room = match action {
        Some(Action::Error(code)) => return failure(code),
        Some(Action::Short(most)) => most,
        _ => usize::MAX,
    };
    let mut done: isize = 0;
    for piece in pieces {
        let base = {
            let registry = registry();
            let below = registry.buffers.range(..=piece.address).next_back();
            below.map(|(base, _)| *base)
        };
        let Some(base) = base else {
            return failure(UNKNOWN_BUFFER);
        };
        let bytes = piece.bytes.min(room);
        let flip = action.filter(|action| *action == Action::Flip && done == 0);
        let offset = (piece.address - base) as i64;
        let moved = transfer(
            flip,
            handle,
            base,
            bytes,
            file_offset + done as i64,
            offset,
            write,
        );
        if moved < 0 {
            return moved;
        }
        done += moved;
        room -= bytes;
        if moved as usize != piece.bytes {
            break;
        }
    }
    done
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterBool(parameter: c_int, value: bool) -> Status {
    begin!("cuFileSetParameterBool");
    registry().switches.insert(parameter, value);
    status(0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterSizeT(_parameter: c_int, _value: usize) -> Status {
    begin!("cuFileSetParameterSizeT");
    status(0)
}

fn failure(code: c_int) -> isize {
    -isize::try_from(code).unwrap_or(1)
}

/// Moves bytes between a file and device memory, as far as the script lets it.
fn transfer(
    action: Option<Action>,
    handle: *mut c_void,
    base: u64,
    bytes: usize,
    file_offset: i64,
    buffer_offset: i64,
    write: bool,
) -> isize {
    let bytes = match action {
        Some(Action::Error(code)) => return failure(code),
        Some(Action::Short(most)) => bytes.min(most),
        _ => bytes,
    };
    let Ok(offset) = u64::try_from(buffer_offset) else {
        return failure(OUT_OF_RANGE);
    };
    let fd = {
        let registry = registry();
        if registry.process != std::process::id() {
            return failure(INTERNAL);
        }
        match registry.buffers.get(&base) {
            None => return failure(UNKNOWN_BUFFER),
            Some(room) if offset as usize + bytes > *room => return failure(OUT_OF_RANGE),
            Some(_) => {}
        }
        match registry.files.get(&handle.addr()) {
            Some(fd) => *fd,
            None => return failure(UNKNOWN_FILE),
        }
    };
    let memory = translate(base + offset, bytes);
    if memory.is_null() {
        return failure(OUT_OF_RANGE);
    }
    if !(memory.addr() | bytes).is_multiple_of(ALIGNMENT) {
        return failure(5022);
    }
    let mut done = 0;
    while done < bytes {
        // SAFETY: the range was checked.
        let rest = unsafe { memory.add(done) };
        let at = file_offset + done as i64;
        let moved = if write {
            // SAFETY: as above; the descriptor is the caller's.
            unsafe { libc::pwrite(fd, rest.cast(), bytes - done, at) }
        } else {
            // SAFETY: as above.
            unsafe { libc::pread(fd, rest.cast(), bytes - done, at) }
        };
        match usize::try_from(moved) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(_) => return -1,
        }
    }
    if action == Some(Action::Flip) && !write && done > 0 {
        // SAFETY: inside the range.
        let middle = unsafe { memory.add(done / 2) };
        // SAFETY: as above.
        unsafe { *middle ^= 16 };
    }
    isize::try_from(done).unwrap_or(isize::MAX)
}
