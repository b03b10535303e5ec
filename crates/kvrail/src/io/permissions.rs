//! The permission bits of what is created.

use rustix::fs::Mode;

/// Permission bits of new files and folders.
///
/// They are set exactly as they stand here: the umask of the process neither takes bits away nor
/// adds any. What exists already keeps the bits that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    file: u32,
}

impl Default for Permissions {
    /// The owner only: files 0600, folders 0700.
    fn default() -> Self {
        Self::of_files(0o600)
    }
}

impl Permissions {
    /// Makes the permissions whose files have the bits `file`, such as `0o640`.
    ///
    /// Folders have the same and, for whoever may read, the right to enter: `0o750`.
    pub fn of_files(file: u32) -> Self {
        Self { file: file & 0o777 }
    }

    /// Returns the bits of files.
    pub(super) fn file(self) -> Mode {
        Mode::from_raw_mode(self.file)
    }

    /// Returns the bits of folders.
    pub(super) fn folder(self) -> Mode {
        Mode::from_raw_mode(self.file | (self.file & 0o444) >> 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_may_be_entered_by_whoever_may_read_files() {
        for (file, folder) in [
            (0o600, 0o700),
            (0o640, 0o750),
            (0o660, 0o770),
            (0o644, 0o755),
        ] {
            let permissions = Permissions::of_files(file);
            assert_eq!(permissions.file().as_raw_mode(), file);
            assert_eq!(permissions.folder().as_raw_mode(), folder);
        }
    }
}
