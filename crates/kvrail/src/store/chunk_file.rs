//! A chunk's file: opened for a load, and what is done about one that is missing or bad.

use std::sync::Arc;
use std::time::Instant;

use super::mount::Mount;
use super::notice::Topic;
use super::present::Place;
use super::publish::{is_gone, is_missing};
use super::quarantine::{SetAside, set_aside};
use super::shared::StoreShared;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{FileStatus, IoFile};

/// Opens what has a chunk's name.
pub(super) fn open_chunk(mount: &Mount, place: &Place) -> Result<(Arc<IoFile>, FileStatus)> {
    let below = mount.directory.chunk_location(place)?.below();
    let opened = mount
        .directory
        .open()
        .and_then(|namespace| mount.open_chunk(&namespace, &below));
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            // What no process of ours leaves at a chunk's name: a symbolic link, a directory, a
            // socket, a file that its owner cannot read.
            let foreign = [
                rustix::io::Errno::LOOP,
                rustix::io::Errno::ISDIR,
                rustix::io::Errno::NOTDIR,
                rustix::io::Errno::ACCESS,
                rustix::io::Errno::INVAL,
                rustix::io::Errno::NXIO,
            ]
            .map(|errno| Some(errno.raw_os_error()))
            .contains(&error.os_error().and_then(std::io::Error::raw_os_error));
            if !foreign {
                return Err(error);
            }
            return Err(Error::new(ErrorKind::Damaged, "no readable chunk file").with_source(error));
        }
    };
    let status = file.status()?;
    Ok((Arc::new(file), status))
}

/// Checks that a chunk file is a regular file of the right length.
pub(super) fn check_chunk(file: &IoFile, status: &FileStatus, file_bytes: usize) -> Result<()> {
    let damaged =
        |message: String| Err(Error::new(ErrorKind::Damaged, message).with_path(file.path()));
    if !status.is_file {
        return damaged("not a regular file".into());
    }
    if status.bytes != file_bytes as u64 {
        let bytes = status.bytes;
        return damaged(format!("expected {file_bytes} bytes, the file has {bytes}"));
    }
    Ok(())
}

/// Takes note of a load that failed at a file: counts it, says so, and sets the file aside if it is
/// damaged. `status` is that of the file, if it was opened.
pub(super) fn note_failure(
    store: &StoreShared,
    mount: &Mount,
    place: Place,
    status: Option<FileStatus>,
    began: Instant,
    error: &Error,
) {
    // A file that was there and is not any more says nothing of its path.
    let is_evicted = status.is_some() && is_gone(error);
    if !is_evicted {
        mount.health.note(&mount.root, began, 0, Some(error));
    }
    if is_evicted || is_missing(error) {
        store.metrics.chunks_missing.add(1);
    } else if error.kind() == ErrorKind::Damaged {
        store.metrics.chunks_damaged.add(1);
        store.notices.warn(Topic::ChunkDamaged, || {
            format!("bad chunk, not used: {error}")
        });
        set_bad_chunk_aside(store, mount, place, status, error);
    } else {
        store.notices.warn(Topic::LoadFailed, || {
            format!("load failed, recomputed: {error}")
        });
    }
}

/// Puts a bad chunk out of the way; one that must stay is remembered, so that it is not read again.
fn set_bad_chunk_aside(
    store: &StoreShared,
    mount: &Mount,
    place: Place,
    status: Option<FileStatus>,
    reason: &Error,
) {
    let remember = || {
        if let Some(status) = status {
            store.bad.insert(place, status);
        }
    };
    // What lies in LMCache's directory is not ours to move.
    if !store.may_write || mount.directory.lmcache.is_some() {
        return remember();
    }
    let inode = status.map(|status| status.inode);
    match set_aside(&mount.directory, &place, inode, &reason.to_string()) {
        Ok(SetAside::Kept) => store.metrics.chunks_set_aside.add(1),
        Ok(SetAside::Removed) => store.metrics.bad_chunks_removed.add(1),
        Ok(SetAside::NotThere) => {}
        Err(error) => {
            remember();
            store.notices.warn(Topic::SetAsideFailed, || {
                format!("a bad chunk stays where it is and is not read again: {error}")
            });
        }
    }
}
