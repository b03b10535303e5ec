//! Whether a path that is left alone is well again.

use super::directory::TEMPORARY_NAME;
use super::health::tells_of_the_path;
use super::manifest::read_manifest;
use super::mount::Mount;
use super::shared::StoreShared;
use crate::error::{Error, Result};
use crate::io::{IoFile, OpenMode};

/// Does on a path what a store, a load and a lookup do there; may hang, and tells by that.
///
/// What cannot be written is no reason to leave a path alone: it may be full or read-only, and
/// loads go on. That writing answers at all is what counts.
///
/// # Errors
/// The system's error when the path cannot be read.
pub(super) fn check(shared: &StoreShared, mount: &Mount) -> Result<()> {
    mount.directory.open_root()?.names()?.take(1).for_each(drop);
    let manifest = mount
        .directory
        .open()
        .and_then(|found| read_manifest(&found));
    match manifest {
        Err(error) if tells_of_the_path(&error) => return Err(error),
        _ => {}
    }
    if shared.may_write && mount.report.writable {
        let (written, renamed) = ("check", "checked");
        let (written, renamed) = (
            shared.writer.file_name(written),
            shared.writer.file_name(renamed),
        );
        drop(write(mount, &written, &renamed));
    }
    Ok(())
}

/// Writes a file, renames it, reads it back and removes it.
fn write(mount: &Mount, written: &str, renamed: &str) -> Result<Vec<u8>> {
    let folder = mount.directory.open()?.folder(TEMPORARY_NAME)?;
    let moved = IoFile::open_in(&folder, written, OpenMode::CreateNew, false).and_then(|file| {
        let text = rustix::io::pwrite(&file, b"is this path well again?", 0);
        text.map_err(|errno| Error::io("write", file.path(), errno.into()))?;
        file.sync()?;
        drop(file);
        folder.rename(written, &folder, renamed)
    });
    let read = moved.and_then(|()| {
        IoFile::open_in(&folder, renamed, OpenMode::Read, false)?.read_bounded(4096)
    });
    drop(folder.remove_file(written));
    drop(folder.remove_file(renamed));
    read
}
