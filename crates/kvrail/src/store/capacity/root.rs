//! A path of `gds_path`, and the folder for accounts and lease below it.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::{Folder, FolderRules, Observer, Permissions};

/// Folder below each path for accounts, the janitor's lease and the record of its bandwidth.
pub(in crate::store) const STATE_NAME: &str = ".kvrail";
/// The folder of accounts, below the path.
const ACCOUNT_NAME: &str = ".kvrail/account";

/// A path that chunks are kept below. Opened anew for each operation, as namespaces are.
#[derive(Debug, Clone)]
pub(super) struct Root {
    path: PathBuf,
    rules: FolderRules,
    /// The file system that it was on at first.
    device: Option<u64>,
}

impl Root {
    /// Takes a path; what is created below it has the bits of `permissions`.
    pub(super) fn new(path: &Path, permissions: Permissions) -> Self {
        let rules = FolderRules {
            permissions,
            observer: None,
        };
        let opened = Folder::open(path, rules.clone()).ok();
        Self {
            path: path.to_path_buf(),
            device: opened.and_then(|folder| device(&folder).ok()),
            rules,
        }
    }

    /// Takes a path that stores use; what is created has the bits of what they have created.
    pub(super) fn existing(path: &Path) -> Self {
        let mut root = Self::new(path, Permissions::default());
        let state = root.open().and_then(|folder| folder.folder(STATE_NAME));
        if let Ok(permissions) = state.and_then(|folder| folder.own_permissions()) {
            root.rules.permissions = permissions;
        }
        root
    }

    /// Has changes told to an observer.
    pub(super) fn observed(mut self, observer: Option<Observer>) -> Self {
        self.rules.observer = observer;
        self
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the path itself.
    pub(super) fn open(&self) -> Result<Folder> {
        Folder::open(&self.path, self.rules.clone())
    }

    /// Opens the folder of the lease.
    pub(super) fn state(&self) -> Result<Folder> {
        self.open()?.folder(STATE_NAME)
    }

    /// Opens the folder of the accounts.
    pub(super) fn accounts(&self) -> Result<Folder> {
        self.open()?.folder(ACCOUNT_NAME)
    }

    /// Opens the folder of the accounts, and makes what is missing of it.
    ///
    /// # Errors
    /// Those of the file system, also when it is another one than at first: below a path whose file
    /// system was unmounted, nothing is made.
    pub(super) fn make_accounts(&self) -> Result<Folder> {
        let folder = self.open()?;
        if self
            .device
            .is_some_and(|before| device(&folder).ok() != Some(before))
        {
            let source = std::io::Error::from(std::io::ErrorKind::NotConnected);
            let operation = "keep accounts: the file system that was mounted here is gone";
            return Err(Error::io(operation, &self.path, source));
        }
        folder.make(ACCOUNT_NAME, false)
    }
}

fn device(folder: &Folder) -> rustix::io::Result<u64> {
    rustix::fs::fstat(folder.as_fd()).map(|stat| stat.st_dev)
}
