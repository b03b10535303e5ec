//! Changes of a file's attributes.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use fuser::TimeOrNow;
use rustix::fs::{CWD, Timespec, Timestamps};

pub(super) fn timespec(time: Option<TimeOrNow>) -> Timespec {
    let (seconds, nanoseconds) = match time {
        None => (0, rustix::fs::UTIME_OMIT),
        Some(TimeOrNow::Now) => (0, rustix::fs::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            (since.as_secs() as i64, i64::from(since.subsec_nanos()))
        }
    };
    Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    }
}

/// What `setattr` shall change.
pub(super) struct Changes {
    pub(super) mode: Option<u32>,
    pub(super) owner: Option<u32>,
    pub(super) group: Option<u32>,
    pub(super) bytes: Option<u64>,
    pub(super) times: Option<Timestamps>,
}

impl Changes {
    pub(super) fn apply(&self, path: &Path) -> io::Result<()> {
        if let Some(mode) = self.mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        }
        if self.owner.is_some() || self.group.is_some() {
            std::os::unix::fs::lchown(path, self.owner, self.group)?;
        }
        if let Some(bytes) = self.bytes {
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .set_len(bytes)?;
        }
        if let Some(times) = &self.times {
            rustix::fs::utimensat(CWD, path, times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}
