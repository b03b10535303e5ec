//! Which file system a path is on: what lies below a mount point must not fill the one beneath it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result};

/// Returns the number of the file system that a path is on, or its nearest parent that is there.
pub(super) fn device_below(path: &Path) -> std::io::Result<u64> {
    let found = path
        .ancestors()
        .find_map(|path| match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            found => Some(found.map(|metadata| metadata.dev())),
        });
    found.unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()))
}

/// Checks that a path is on the file system that it was on before, where that is known.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when it is on another one.
pub(super) fn check_device(path: &Path, before: Option<u64>, operation: &str) -> Result<()> {
    let found = device_below(path).map_err(|source| Error::io("stat", path, source))?;
    if before.is_none_or(|device| device == found) {
        return Ok(());
    }
    let operation = format!("{operation}: the file system that was mounted here is gone");
    let source = std::io::Error::from(std::io::ErrorKind::NotConnected);
    Err(Error::io(&operation, path, source))
}
