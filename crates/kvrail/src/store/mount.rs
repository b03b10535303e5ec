//! One path of the store while it is in use: what it can do, how it fares, how full it is.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::active_engine::ActiveEngine;
use super::directory::NamespaceDirectory;
use super::engine::Chosen;
use super::file_system::{check_device, device_below};
use super::gpu::CufileState;
use super::health::{Health, tells_of_the_path};
use crate::config::{MinFree, PageCache};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, IoFile, MountReport, OpenMode};

/// How long stores leave a path alone after it failed.
const PAUSE: Duration = Duration::from_secs(5);
/// Errors of stores in a row after which they pause.
const ERRORS_MAX: u32 = 4;
/// The same when it has too little room by our own count: the janitor makes some in less time.
const PAUSE_FOR_ROOM: Duration = Duration::from_millis(500);
/// Part of the measured free space that one store uses before it measures again.
const SPACE_PART: u64 = 16;
/// How long a measured free space holds.
const SPACE_HOLDS: Duration = Duration::from_secs(1);

/// A path of `gds_path` and its state.
#[derive(Debug)]
pub(super) struct Mount {
    pub(super) root: PathBuf,
    pub(super) directory: NamespaceDirectory,
    pub(super) report: MountReport,
    /// What moves bytes between files and staging memory of the host.
    pub(super) engine: ActiveEngine,
    /// Whether the engine is still to be compared with the other one, from when the store is open.
    pub(super) is_undecided: bool,
    /// Whether stores through the host leave what they write in the page cache.
    keeps_cached: bool,
    /// Whether cuFile moves the bytes, and how it fares.
    pub(super) cufile: CufileState,
    pub(super) health: Health,
    /// Whether the namespace is still to get its manifest, before a chunk.
    lacks_manifest: AtomicBool,
    /// The file system that the path was on when the store was opened.
    device: Option<u64>,
    min_free: MinFree,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    paused: Option<(Instant, Pause)>,
    /// Errors of stores in a row that tell of the path.
    errors: u32,
    space_measured: Option<Instant>,
    /// Bytes that may be stored before free space is measured again.
    space_left: u64,
}

/// Why stores leave a path alone for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// Too little space, or a quota.
    NoSpace,
    /// The path refuses writes or does not answer.
    Unwell,
}

impl Mount {
    pub(super) fn new(
        root: PathBuf,
        directory: NamespaceDirectory,
        report: MountReport,
        chosen: Chosen,
        min_free: MinFree,
        health: Health,
    ) -> Self {
        Self {
            device: device_below(&root).ok(),
            root,
            directory,
            report,
            engine: ActiveEngine::new(chosen),
            is_undecided: false,
            keeps_cached: false,
            cufile: CufileState::default(),
            health,
            lacks_manifest: AtomicBool::new(false),
            min_free,
            state: Mutex::default(),
        }
    }

    /// Returns whether the namespace is still to get its manifest: without one nobody counts, lists
    /// or evicts its chunks.
    pub(super) fn lacks_manifest(&self) -> bool {
        self.lacks_manifest.load(Ordering::Acquire)
    }

    /// Notes whether the namespace is still to get its manifest.
    pub(super) fn set_lacks_manifest(&self, lacks: bool) {
        self.lacks_manifest.store(lacks, Ordering::Release);
    }

    /// Sets what loads and stores have to do with the page cache. Without O_DIRECT all goes through
    /// it anyway.
    pub(super) fn with_page_cache(mut self, wish: PageCache) -> Self {
        self.keeps_cached = wish == PageCache::Keep;
        self.engine = self.engine.with_page_cache(wish, self.report.direct);
        self
    }

    /// Sets whether the engine is still to be compared with the other one.
    pub(super) fn with_undecided(mut self, is_undecided: bool) -> Self {
        self.is_undecided = is_undecided;
        self
    }

    /// Returns whether the files that the host's engine writes are opened direct.
    pub(super) fn writes_direct(&self) -> bool {
        self.report.direct && !self.keeps_cached
    }

    /// Opens a chunk file for a load.
    ///
    /// # Errors
    /// As of [`IoFile::open_in`].
    pub(super) fn open_chunk(&self, namespace: &Folder, below: &str) -> Result<IoFile> {
        let file = IoFile::open_in(namespace, below, OpenMode::Read, self.report.direct)?;
        // cuFile goes past the page cache in any case.
        match self.cufile.is_on() {
            true => Ok(file),
            false => Ok(self.engine.look_at(file, namespace, below)),
        }
    }

    /// Returns what the path does now, and why.
    pub(super) fn describe(&self) -> MountReport {
        let mut report = self.report.clone();
        (report.engine, report.engine_reason) = self.engine.describe();
        match self.cufile.describe() {
            Some((true, reason)) => {
                report.engine = "cufile";
                report.reason = reason;
            }
            Some((false, reason)) => report.reason.push_str(&format!("; no cuFile: {reason}")),
            None => {}
        }
        report
    }

    /// Returns why nothing should be stored now, `None` if it may be tried.
    pub(super) fn paused(&self) -> Option<Pause> {
        if !self.report.writable || self.health.is_out() {
            return Some(Pause::Unwell);
        }
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .paused
            .and_then(|(until, pause)| (Instant::now() < until).then_some(pause))
    }

    /// Takes note of a failed store; some failures make the path rest for a while.
    pub(super) fn note_failure(&self, error: &Error) {
        use std::io::ErrorKind as Os;
        let pause = match (error.kind(), error.os_error().map(std::io::Error::kind)) {
            (ErrorKind::NoSpace, _) => Pause::NoSpace,
            (ErrorKind::TimedOut, _)
            | (
                _,
                Some(
                    Os::ReadOnlyFilesystem
                    | Os::PermissionDenied
                    | Os::StaleNetworkFileHandle
                    | Os::NotConnected
                    | Os::NotFound,
                ),
            ) => Pause::Unwell,
            // One such error may be about a single file.
            _ if tells_of_the_path(error) && self.count_error() >= ERRORS_MAX => Pause::Unwell,
            _ => return,
        };
        let is_ours = pause == Pause::NoSpace && error.os_error().is_none();
        let length = if is_ours { PAUSE_FOR_ROOM } else { PAUSE };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.paused = Some((Instant::now() + length, pause));
    }

    /// Checks that the path is on the file system that it was opened on.
    ///
    /// Before the namespace's directory is made again: when a file system was unmounted, its chunks
    /// must not fill the one below the mount point.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when it is on another one.
    pub(super) fn check_device(&self) -> Result<()> {
        check_device(&self.root, self.device, "store")
    }

    fn count_error(&self) -> u32 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.errors += 1;
        state.errors
    }

    /// Takes note of a store that went well.
    pub(super) fn note_success(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.errors = 0;
    }

    /// Asks the file system how full it is. A path that somebody removed is made again by the store
    /// that asks, so it is its parent's file system then, if that is the same.
    fn statistics(&self) -> Result<rustix::fs::StatVfs> {
        for path in self.root.ancestors() {
            match rustix::fs::statvfs(path) {
                Err(rustix::io::Errno::NOENT) => self.check_device()?,
                found => return found.map_err(|errno| Error::io("statvfs", path, errno.into())),
            }
        }
        let source = std::io::ErrorKind::NotFound.into();
        Err(Error::io("statvfs", &self.root, source))
    }

    /// Checks that `bytes` more leave `min_free`. Asks the file system once a second, and more often
    /// when much is stored or little is left.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when they do not.
    pub(super) fn check_space(&self, bytes: u64) -> Result<()> {
        let now = Instant::now();
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state
                .space_measured
                .is_some_and(|at| now.duration_since(at) < SPACE_HOLDS)
                && state.space_left >= bytes
            {
                state.space_left -= bytes;
                return Ok(());
            }
            state.space_measured = Some(now);
        }
        let statistics = self.statistics()?;
        let available = statistics.f_bavail.saturating_mul(statistics.f_frsize);
        let total = statistics.f_blocks.saturating_mul(statistics.f_frsize);
        let reserve = match self.min_free {
            MinFree::Bytes(bytes) => bytes,
            MinFree::Share(share) => (total as f64 * share) as u64,
        };
        if available >= reserve.saturating_add(bytes) {
            // A part of what is left: other stores use the same space meanwhile.
            let left = (available - reserve - bytes) / SPACE_PART;
            self.state
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .space_left = left;
            return Ok(());
        }
        // Measured again by the first store after the pause.
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .space_measured = None;
        let message = format!("{available} of {total} bytes are free, min_free keeps {reserve}");
        Err(Error::new(ErrorKind::NoSpace, message).with_path(&self.root))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Namespace;
    use super::*;
    use crate::io::PosixEngine;

    fn mount(root: &str, min_free: MinFree) -> Arc<Mount> {
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let report = MountReport {
            path: root.into(),
            file_system: "ext4".into(),
            engine: "posix",
            engine_reason: String::new(),
            direct: false,
            writable: true,
            reason: String::new(),
        };
        let directory = NamespaceDirectory::new(root.as_ref(), &namespace);
        let health = Health::new(Duration::from_secs(2), Arc::default(), Arc::default());
        let engine = Arc::new(PosixEngine::new(1, Arc::new(|| ())).unwrap());
        let root = PathBuf::from(root);
        let chosen: Chosen = (engine, String::new());
        Arc::new(Mount::new(
            root, directory, report, chosen, min_free, health,
        ))
    }

    #[test]
    fn space_below_the_reserve_is_refused_and_rests_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_str().unwrap();
        assert!(mount(root, MinFree::Bytes(0)).check_space(1).is_ok());
        let full = mount(root, MinFree::Bytes(u64::MAX));
        let error = full.check_space(1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(full.paused(), None);
        full.note_failure(&error);
        assert_eq!(full.paused(), Some(Pause::NoSpace));
    }
}
