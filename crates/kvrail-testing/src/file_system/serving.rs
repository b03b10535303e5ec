//! How an operation is served: at once, late, never, or with an error, as the script says.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuser::{
    Errno, INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite,
};

use super::control::Control;
use super::errno;
use super::folder::Folder;
use crate::rules::{Effect, Fault};

/// How long the kernel believes what it was told: not at all, so that every operation comes here.
pub(super) const NOT_AT_ALL: Duration = Duration::ZERO;

/// What the operations share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) folder: Folder,
    control: Control,
}

/// The file system.
#[derive(Debug)]
pub(super) struct FaultFileSystem {
    pub(super) shared: Arc<Shared>,
}

/// A reply that can say no.
pub(super) trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyEmpty,
    ReplyEntry,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite
);

/// Ends an operation that gave nothing but success, and may say that it did not.
pub(super) fn done(reply: ReplyEmpty, fault: &Fault, result: io::Result<()>) {
    match (result, fault.effect) {
        (Ok(()), Some(Effect::Done(number))) => reply.error(Errno::from_i32(number)),
        (Ok(()), _) => reply.ok(),
        (Err(error), _) => reply.error(errno(&error)),
    }
}

impl FaultFileSystem {
    pub(super) fn new(source: &Path, control: &Path, seed: u64) -> io::Result<Self> {
        let shared = Shared {
            folder: Folder::new(source)?,
            control: Control::new(control, seed)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Does an operation, or what the script says instead of it.
    pub(super) fn serve<R: Refuse>(
        &self,
        operation: &'static str,
        path: io::Result<PathBuf>,
        reply: R,
        work: impl FnOnce(&Shared, &Fault, R) + Send + 'static,
    ) {
        let path = match path {
            Ok(path) => path.to_string_lossy().into_owned(),
            Err(error) => return reply.refuse(errno(&error)),
        };
        let fault = self.shared.control.decide(operation, &path);
        let finish = |shared: &Shared, fault: &Fault, reply: R| match fault.effect {
            Some(Effect::Error(number)) => reply.refuse(Errno::from_i32(number)),
            _ => work(shared, fault, reply),
        };
        if fault.delay.is_zero() && !fault.hang {
            return finish(&self.shared, &fault, reply);
        }
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            shared.control.hold(operation, &path, &fault);
            finish(&shared, &fault, reply);
        });
    }

    pub(super) fn below(&self, inode: INodeNo) -> io::Result<PathBuf> {
        self.shared.folder.below(inode.0)
    }

    pub(super) fn entry(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.shared.folder.entry(parent.0, name)?.0)
    }
}
