//! Watching what is done to a directory, change by change.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// One change that was made below a [`Folder`](super::Folder), or one that was made durable.
///
/// What an I/O engine writes into a file is not among them: whoever wants to see that wraps the
/// engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step<'a> {
    /// A folder was made.
    MakeFolder(&'a Path),
    /// A file was created, empty.
    CreateFile(&'a Path),
    /// Bytes were written to a file, from `offset` on.
    WriteFile {
        /// The file.
        path: &'a Path,
        /// Bytes from its start.
        offset: u64,
        /// What was written.
        bytes: &'a [u8],
    },
    /// A file's bytes and length were made durable.
    SyncFile(&'a Path),
    /// A file or folder got another name; what had that name is gone.
    Rename {
        /// The old name.
        source: &'a Path,
        /// The new name.
        target: &'a Path,
    },
    /// A file or an empty folder was removed.
    Remove(&'a Path),
    /// The names in a folder were made durable.
    SyncFolder(&'a Path),
}

/// Is told of each [`Step`] right after it was done, on the thread that did it.
///
/// For tests that count steps, stop a process at one of them, or replay them without the last.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Step<'_>) + Send + Sync>);

impl Observer {
    /// Makes an observer of a function.
    pub fn new(tell: impl Fn(&Step<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Tells of a step.
    pub(crate) fn tell(&self, step: &Step<'_>) {
        (self.0)(step);
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Observer")
    }
}

/// Equal when it is the same one.
impl PartialEq for Observer {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Observer {}
