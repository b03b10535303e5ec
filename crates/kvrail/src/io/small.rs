//! Small files that are written in place: over what they hold, or behind it.

use std::fs::File;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::folder::{Folder, set_exact_mode};
use super::observer::Step;
use crate::error::{Error, Result};

/// What a small file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SmallMode {
    /// Reading what is there.
    Read,
    /// Writing over what is there.
    Write,
    /// Writing to a file that must not exist yet.
    CreateNew,
    /// Writing behind what is there, if anything is.
    Append,
}

impl Folder {
    /// Opens the small file `name`; what is created has the folder's bits.
    ///
    /// A symbolic link is refused, and so is waiting for a FIFO.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) with the system's error.
    pub(crate) fn small_file(&self, name: &str, mode: SmallMode) -> Result<File> {
        let open = |flags: OFlags, bits: Mode| {
            let flags = flags | OFlags::NONBLOCK;
            self.open_below(Path::new(name), flags, bits)
        };
        let create = || {
            let bits = self.permissions().file();
            let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL;
            let flags = match mode {
                SmallMode::Append => flags,
                _ => flags.difference(OFlags::APPEND),
            };
            let file = open(flags, bits)?;
            set_exact_mode(&file, bits)?;
            self.tell(&Step::CreateFile(&self.path().join(name)));
            Ok(file)
        };
        let append = || open(OFlags::WRONLY | OFlags::APPEND, Mode::empty());
        let opened = match mode {
            SmallMode::Read => open(OFlags::RDONLY, Mode::empty()),
            SmallMode::Write => open(OFlags::WRONLY, Mode::empty()),
            SmallMode::CreateNew => create(),
            SmallMode::Append => match append() {
                Err(rustix::io::Errno::NOENT) => match create() {
                    // Made by somebody else at this very moment.
                    Err(rustix::io::Errno::EXIST) => append(),
                    created => created,
                },
                opened => opened,
            },
        };
        opened
            .map(File::from)
            .map_err(|errno| Error::io("open", &self.path().join(name), errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::io::{FolderRules, Permissions};

    #[test]
    fn files_are_made_with_the_folder_s_bits_and_links_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let rules = FolderRules {
            permissions: Permissions::of_files(0o664),
            observer: None,
        };
        let folder = Folder::open(directory.path(), rules).unwrap();
        let open = |name: &str, mode| folder.small_file(name, mode);
        assert!(open("a", SmallMode::Read).is_err() && open("a", SmallMode::Write).is_err());
        open("a", SmallMode::CreateNew)
            .unwrap()
            .write_all(b"1234")
            .unwrap();
        assert!(open("a", SmallMode::CreateNew).is_err());
        open("a", SmallMode::Write)
            .unwrap()
            .write_all(b"5")
            .unwrap();
        open("a", SmallMode::Append)
            .unwrap()
            .write_all(b"6")
            .unwrap();
        open("b", SmallMode::Append)
            .unwrap()
            .write_all(b"7")
            .unwrap();
        let mut text = String::new();
        open("a", SmallMode::Read)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "52346");
        for name in ["a", "b"] {
            let found = directory.path().join(name).metadata().unwrap();
            assert_eq!(found.permissions().mode() & 0o777, 0o664);
        }
        std::os::unix::fs::symlink("a", directory.path().join("link")).unwrap();
        for mode in [
            SmallMode::Read,
            SmallMode::Write,
            SmallMode::CreateNew,
            SmallMode::Append,
        ] {
            assert!(open("link", mode).is_err(), "{mode:?}");
            assert!(open("../a", mode).is_err(), "{mode:?}");
        }
    }
}
