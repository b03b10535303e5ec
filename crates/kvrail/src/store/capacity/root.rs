//! A path of `gds_path`, and the folder for accounts and lease below it.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::io::{Folder, FolderRules, Observer, Permissions, make_path};
use crate::store::file_system::{check_device, device_below};
use crate::store::publish::is_missing;

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
        Self {
            path: path.to_path_buf(),
            device: device_below(path).ok(),
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

    /// Says that the path was on another file system at first.
    #[cfg(test)]
    pub(super) fn set_device(&mut self, device: u64) {
        self.device = Some(device);
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

    /// Opens the folder of the accounts, and makes what is missing of it, the path itself too.
    ///
    /// # Errors
    /// Those of the file system, also when it is another one than at first: below a path whose file
    /// system was unmounted, nothing is made.
    pub(super) fn make_accounts(&self) -> Result<Folder> {
        check_device(&self.path, self.device, "keep accounts")?;
        let folder = match self.open() {
            Err(error) if is_missing(&error) => {
                make_path(&self.path, &self.rules, false)?;
                self.open()?
            }
            opened => opened?,
        };
        folder.make(ACCOUNT_NAME, false)
    }
}
