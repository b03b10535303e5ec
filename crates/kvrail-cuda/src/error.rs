//! The one error type: which C function, which code, and what it means.

use std::fmt;

/// What a caller can do about an [`Error`].
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The library is not installed, or cannot be loaded.
    LibraryMissing,
    /// The library lacks a function: it is too old, or another library.
    SymbolMissing,
    /// There is no GPU.
    NoDevice,
    /// The GPU has not so much free memory.
    OutOfMemory,
    /// A caller passed something that cannot work.
    InvalidArgument,
    /// The library cannot do it, here or at all.
    Unsupported,
    /// Anything else that the library answered.
    Failed,
}

/// An error of a library's function.
///
/// Displayed in one line: ``cuFileHandleRegister: 5027, file is not registered``.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    code: Option<i32>,
    message: String,
}

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(
        kind: ErrorKind,
        operation: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            operation,
            code: None,
            message: message.into(),
        }
    }

    pub(crate) fn cuda(operation: &'static str, code: i32) -> Self {
        let (kind, message) = cuda_meaning(code);
        Self {
            kind,
            operation,
            code: Some(code),
            message: message.to_owned(),
        }
    }

    pub(crate) fn cufile(operation: &'static str, code: i32, cuda: i32) -> Self {
        let (kind, message) = cufile_meaning(code);
        let message = match cuda {
            0 => message.to_owned(),
            _ => format!("{message} (CUDA {cuda}: {})", cuda_meaning(cuda).1),
        };
        Self {
            kind,
            operation,
            code: Some(code),
            message,
        }
    }

    /// Returns what a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the C function, or what was done instead of calling one.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Returns the code of `CUresult` or `CUfileOpError`, where the library gave one.
    pub fn code(&self) -> Option<i32> {
        self.code
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(out, "{}: {code}, {}", self.operation, self.message),
            None => write!(out, "{}: {}", self.operation, self.message),
        }
    }
}

impl std::error::Error for Error {}

/// Meaning of a `CUresult` (cuda.h, `cudaError_enum`).
fn cuda_meaning(code: i32) -> (ErrorKind, &'static str) {
    match code {
        1 => (ErrorKind::InvalidArgument, "invalid value"),
        2 => (ErrorKind::OutOfMemory, "out of memory"),
        3 => (ErrorKind::Failed, "driver not initialised"),
        4 => (ErrorKind::Failed, "driver is shutting down"),
        34 => (
            ErrorKind::LibraryMissing,
            "only a stub of the driver is installed",
        ),
        100 => (ErrorKind::NoDevice, "no CUDA device"),
        101 => (ErrorKind::NoDevice, "no such CUDA device"),
        201 => (
            ErrorKind::InvalidArgument,
            "no or another context is current",
        ),
        218 => (
            ErrorKind::Unsupported,
            "the PTX is not valid for this driver",
        ),
        222 => (ErrorKind::Unsupported, "the PTX is newer than this driver"),
        500 => (ErrorKind::SymbolMissing, "not found"),
        700 => (ErrorKind::Failed, "illegal address in a kernel or copy"),
        712 => (ErrorKind::InvalidArgument, "host memory is pinned already"),
        713 => (ErrorKind::InvalidArgument, "host memory is not pinned"),
        801 => (ErrorKind::Unsupported, "not supported"),
        802 => (ErrorKind::Failed, "the system is not ready"),
        803 => (ErrorKind::Failed, "driver and library versions do not fit"),
        999 => (ErrorKind::Failed, "unknown error of the driver"),
        _ => (ErrorKind::Failed, "error of the driver"),
    }
}

/// Meaning of a `CUfileOpError` (cufile.h); later versions use new numbers for other things, so
/// unknown ones stay numbers.
fn cufile_meaning(code: i32) -> (ErrorKind, &'static str) {
    match code {
        5001 => (ErrorKind::Unsupported, "nvidia-fs driver is not loaded"),
        5004 | 5005 => (
            ErrorKind::Unsupported,
            "nvidia-fs driver has another version",
        ),
        5007 => (
            ErrorKind::Unsupported,
            "GPUDirect Storage is not supported on this platform",
        ),
        5008 => (
            ErrorKind::Unsupported,
            "GPUDirect Storage is not supported on this file",
        ),
        5009 => (
            ErrorKind::Unsupported,
            "GPUDirect Storage is not supported on this GPU",
        ),
        5010 => (ErrorKind::Failed, "nvidia-fs driver refused"),
        5011 => (ErrorKind::Failed, "CUDA driver error"),
        5012 => (ErrorKind::InvalidArgument, "not a pointer to GPU memory"),
        5013 => (
            ErrorKind::InvalidArgument,
            "memory of a kind that cuFile does not take",
        ),
        5014 => (ErrorKind::InvalidArgument, "range outside the GPU memory"),
        5015 => (ErrorKind::InvalidArgument, "another CUDA context"),
        5016 | 5017 => (
            ErrorKind::InvalidArgument,
            "beyond the pinned or mapped size",
        ),
        5018 => (ErrorKind::Unsupported, "kind of file not supported"),
        5019 => (
            ErrorKind::InvalidArgument,
            "file opened with flags that do not fit",
        ),
        5020 => (ErrorKind::InvalidArgument, "file not opened with O_DIRECT"),
        5022 => (ErrorKind::InvalidArgument, "invalid value"),
        5023 => (ErrorKind::InvalidArgument, "memory is registered already"),
        5024 => (ErrorKind::InvalidArgument, "memory is not registered"),
        5025 => (ErrorKind::Failed, "no permission"),
        5026 => (ErrorKind::Failed, "driver is open already"),
        5027 => (
            ErrorKind::Unsupported,
            "file is not registered; no udev record for this mount: running in a container?",
        ),
        5028 => (ErrorKind::InvalidArgument, "file is registered already"),
        5029 => (ErrorKind::NoDevice, "no GPU"),
        5030 => (ErrorKind::Failed, "internal error of cuFile"),
        5033 => (ErrorKind::Unsupported, "cuFile cannot be set up here"),
        5034 => (
            ErrorKind::Unsupported,
            "turned off by cuFile's configuration",
        ),
        5036 => (
            ErrorKind::OutOfMemory,
            "GPU memory cannot be pinned for I/O (BAR1 full?)",
        ),
        5043 => (ErrorKind::OutOfMemory, "cuFile has no memory left"),
        5044 => (ErrorKind::Failed, "I/O error"),
        5045 => (ErrorKind::Failed, "memory cannot be registered"),
        _ => (ErrorKind::Failed, "error of cuFile"),
    }
}

/// Turns a `CUresult` into a result.
pub(crate) fn check(operation: &'static str, code: i32) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Error::cuda(operation, code)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
    use super::*;

    #[test]
    fn errors_name_function_number_and_meaning() {
        let error = check("cuMemAlloc", 2).unwrap_err();
        assert_eq!(error.to_string(), "cuMemAlloc: 2, out of memory");
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        let error = Error::cufile("cuFileBufRegister", 5011, 201);
        assert_eq!(
            error.to_string(),
            "cuFileBufRegister: 5011, CUDA driver error (CUDA 201: no or another context is current)"
        );
        assert_eq!(Error::cufile("cuFileRead", 5099, 0).code(), Some(5099));
    }
}
