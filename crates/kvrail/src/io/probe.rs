//! What a mount can do, found out by doing it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Folder, FolderRules, IoEngine, IoFile, IoRequest, OpenMode, Operation};
use crate::chunk::PAGE_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::StagingPool;

/// What kvrail does on one path, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MountReport {
    /// The directory.
    pub path: PathBuf,
    /// The file system's name, as far as it is known by its magic number.
    pub file_system: String,
    /// The I/O engine.
    pub engine: &'static str,
    /// Why that one, in words; with cuFile, why the one that stands in for it.
    pub engine_reason: String,
    /// Whether files are opened with O_DIRECT.
    pub direct: bool,
    /// Whether chunks can be stored.
    pub writable: bool,
    /// Why with or without O_DIRECT, with cuFile, or only for reading, in words.
    pub reason: String,
}

/// Names of file systems by `statfs` magic (linux/magic.h and the file systems' own headers).
const FILE_SYSTEMS: [(u64, &str); 16] = [
    (0x0000_EF53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58F6, "ramfs"),
    (0x794C_7630, "overlay"),
    (0x0000_6969, "nfs"),
    (0xFF53_4D42, "cifs"),
    (0x6573_5546, "fuse"),
    (0x0BD0_0BD0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0x00C3_6400, "ceph"),
    (0x2FC1_2FC1, "zfs"),
    (0xF2F5_2010, "f2fs"),
    (0x1983_0326, "beegfs"),
    (0x0102_1997, "9p"),
];

/// Returns the name of the file system that holds `path`, `unknown (0x...)` for others.
///
/// # Errors
/// [`ErrorKind::Io`] when the system does not tell.
pub fn file_system_name(path: &Path) -> Result<String> {
    name_of(&Folder::open(path, FolderRules::default())?)
}

fn name_of(folder: &Folder) -> Result<String> {
    let statistics = rustix::fs::fstatfs(folder)
        .map_err(|errno| Error::io("statfs", folder.path(), errno.into()))?;
    // The kernel's type is signed on some targets; magic numbers have 32 bits.
    let magic = statistics.f_type as u64 & 0xFFFF_FFFF;
    let known = FILE_SYSTEMS.iter().find(|(number, _)| *number == magic);
    Ok(known.map_or_else(
        || format!("unknown ({magic:#x})"),
        |(_, name)| (*name).to_owned(),
    ))
}

/// Finds out whether O_DIRECT works in `directory`: opens, writes, reads back and compares.
///
/// An open alone proves nothing: tmpfs accepts the flag since Linux 6.6 and ignores it.
/// `wanted` is the user's setting, `None` for automatic. `file_name` must be unique to the caller;
/// the file is removed again. The answer is `(direct, reason)`.
///
/// # Errors
/// [`ErrorKind::Io`] or [`ErrorKind::NoSpace`] when not even a buffered file can be written,
/// [`ErrorKind::TimedOut`] when the mount does not answer within `limit`.
pub fn probe_mount(
    engine: &dyn IoEngine,
    directory: &Path,
    file_name: &str,
    wanted: Option<bool>,
    limit: Duration,
) -> Result<(bool, String)> {
    let folder = Folder::open(directory, FolderRules::default())?;
    probe_folder(engine, &folder, file_name, wanted, limit)
}

/// As [`probe_mount`], in an open folder.
///
/// # Errors
/// As [`probe_mount`].
pub fn probe_folder(
    engine: &dyn IoEngine,
    folder: &Folder,
    file_name: &str,
    wanted: Option<bool>,
    limit: Duration,
) -> Result<(bool, String)> {
    let deadline = Instant::now() + limit;
    let file_system = name_of(folder)?;
    let attempt = |direct| {
        let result = write_and_compare(engine, folder, file_name, direct, deadline);
        drop(folder.remove_file(file_name));
        result
    };
    let buffered = |reason: String| attempt(false).map(|()| (false, reason));
    match (wanted, file_system.as_str()) {
        (Some(false), _) => buffered("use_direct_io is false".into()),
        (_, "tmpfs" | "ramfs") => buffered(format!("{file_system} has no device behind it")),
        _ => match attempt(true) {
            Ok(()) => Ok((true, "O_DIRECT verified by write, read and compare".into())),
            Err(error) if error.kind() == ErrorKind::TimedOut => Err(error),
            Err(error) => buffered(format!("O_DIRECT does not work here ({error})")),
        },
    }
}

/// Writes a page, reads it back through a second open file and compares.
fn write_and_compare(
    engine: &dyn IoEngine,
    folder: &Folder,
    file_name: &str,
    direct: bool,
    deadline: Instant,
) -> Result<()> {
    let path = folder.path().join(file_name);
    let pool = StagingPool::new(2 * PAGE_BYTES, PAGE_BYTES)?;
    let mut buffer = pool.take(deadline)?;
    let pattern = path.as_os_str().len();
    buffer
        .as_mut_slice()
        .iter_mut()
        .enumerate()
        .for_each(|(index, byte)| *byte = ((index * 31 + pattern) % 251) as u8);
    let expected = buffer.as_slice().to_vec();
    let submit = |operation, mode, buffer| {
        let file = Arc::new(IoFile::open_in(folder, file_name, mode, direct)?);
        engine
            .submit(IoRequest {
                operation,
                file,
                offset: 0,
                buffer,
            })
            .wait(deadline)
    };
    drop(submit(Operation::Write, OpenMode::CreateNew, buffer)?);
    let read = submit(Operation::Read, OpenMode::Read, pool.take(deadline)?)?;
    let damaged = |message: String| Err(Error::new(ErrorKind::Damaged, message).with_path(&path));
    if read.as_slice() != expected {
        return damaged("probe: what was read is not what was written".into());
    }
    match folder.status(file_name)? {
        Some(status) if status.bytes == PAGE_BYTES as u64 => Ok(()),
        found => {
            let bytes = found.map(|status| status.bytes);
            damaged(format!(
                "probe: expected {PAGE_BYTES} bytes, the file has {bytes:?}"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::PosixEngine;
    use super::*;

    fn probe(directory: &Path, wanted: Option<bool>) -> Result<(bool, String)> {
        let engine = PosixEngine::new(1, Arc::new(|| ())).unwrap();
        probe_mount(
            &engine,
            directory,
            ".probe",
            wanted,
            Duration::from_secs(20),
        )
    }

    #[test]
    fn direct_io_is_never_claimed_on_tmpfs() {
        let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
            eprintln!("skipped: /dev/shm cannot be written here");
            return;
        };
        let (direct, reason) = probe(directory.path(), Some(true)).unwrap();
        assert!(!direct);
        assert!(reason.contains("tmpfs"), "{reason}");
    }

    #[test]
    fn the_setting_turns_direct_io_off_and_the_probe_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!probe(directory.path(), Some(false)).unwrap().0);
        probe(directory.path(), None).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(probe(&directory.path().join("missing"), None).is_err());
    }
}
