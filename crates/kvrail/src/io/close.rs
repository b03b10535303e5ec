//! Closing with an answer: network file systems send what was written when a file is closed, and say
//! only then that there is no room for it.
#![expect(unsafe_code, reason = "std and rustix close files without an answer")]

use std::os::fd::{AsFd, IntoRawFd, OwnedFd};

/// Closes a file.
///
/// # Errors
/// What the system says: of writes that were not sent before, too. The file is closed all the same.
pub(crate) fn close(file: impl Into<OwnedFd>) -> std::io::Result<()> {
    let descriptor = file.into().into_raw_fd();
    // SAFETY: the descriptor was owned, and nothing else has it now.
    unsafe { rustix::io::try_close(descriptor) }.map_err(Into::into)
}

/// Has what was written to an open file sent, as closing it does. It costs nothing where closing sends
/// nothing, and makes nothing durable.
///
/// # Errors
/// As [`close`].
pub(crate) fn send(file: impl AsFd) -> std::io::Result<()> {
    // Each close of a descriptor sends, whether others are open or not.
    close(rustix::io::fcntl_dupfd_cloexec(file, 0)?)
}
