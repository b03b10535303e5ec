//! The one error type of the library: a kind a caller can act on, a sentence, the path and the cause.

use std::fmt;
use std::path::{Path, PathBuf};

/// What a caller can do about an [`Error`].
///
/// A chunk that is not there is no error: lookups and loads say so by value.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A setting is wrong; the message names key, value and what was expected.
    InvalidConfig,
    /// A caller passed something that cannot work (a block out of range, lengths that disagree).
    InvalidArgument,
    /// Bytes on disk are not what was stored.
    Damaged,
    /// The operating system refused an operation.
    Io,
    /// The file system or a quota is full.
    NoSpace,
    /// A bounded wait ended before the work did.
    TimedOut,
    /// A path is left alone for now, because it did not answer or failed before.
    Unavailable,
    /// The store was closed.
    Closed,
    /// A directory holds another namespace than its name says.
    Mismatch,
    /// The GPU, its driver or cuFile refused an operation.
    Gpu,
}

/// An error with its kind, what failed, on which path, and why.
///
/// Displayed in one line, lower case, no full stop:
/// ``read at 4096: expected 1048576 bytes, got 524288: `/kv/ab/c3.safetensors` ``, followed by
/// `: <cause>` where there is one.
pub struct Error {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// A result whose error is [`Error`] unless said otherwise.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Makes an error of `kind` with a sentence that says what failed.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            path: None,
            source: None,
        }
    }

    /// Makes an error from a failed system call on `path`.
    ///
    /// The kind is [`ErrorKind::NoSpace`] for a full file system or quota, else [`ErrorKind::Io`].
    pub fn io(operation: &str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Os;
        let kind = match source.kind() {
            Os::StorageFull | Os::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::new(kind, operation)
            .with_path(path)
            .with_source(source)
    }

    /// Makes the error of a wrong setting: ``{key} = {value}: expected {expected}``.
    pub fn config(key: &str, value: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::new(
            ErrorKind::InvalidConfig,
            format!("`{key}` = {value}: expected {expected}"),
        )
    }

    /// Makes an error from what the GPU's driver or cuFile said.
    pub(crate) fn gpu(message: impl Into<String>, source: kvrail_cuda::Error) -> Self {
        Self::new(ErrorKind::Gpu, message).with_source(source)
    }

    /// Adds the path that the operation was about.
    #[must_use]
    pub fn with_path(mut self, path: &Path) -> Self {
        self.path = Some(path.to_path_buf());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Returns what a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the path that the operation was about.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns the cause as an operating-system error, where it is one.
    pub fn os_error(&self) -> Option<&std::io::Error> {
        self.source
            .as_ref()
            .and_then(|source| source.downcast_ref())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)?;
        if let Some(path) = &self.path {
            write!(out, ": `{}`", path.display())?;
        }
        if let Some(source) = &self.source {
            write!(out, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Error")
            .field("kind", &self.kind)
            .field("message", &self.message)
            .field("path", &self.path)
            .field("source", &self.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_ref()
            .map(|source| &**source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_its_own_kind_and_the_cause_is_kept() {
        let cause = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = Error::io("write", Path::new("/kv/a"), cause);
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.os_error().is_some());
        assert!(error.to_string().starts_with("write: `/kv/a`: "));
    }

    #[test]
    fn a_config_error_names_key_value_and_expectation() {
        let error = Error::config("chunk_size", 100, "a multiple of the block size 128");
        assert_eq!(
            error.to_string(),
            "`chunk_size` = 100: expected a multiple of the block size 128"
        );
    }
}
