//! Which engine moves the bytes of which path.
//!
//! What the user asks for is taken where it works; else what measures best on the file system,
//! and posix in case of doubt. Measuring takes a fifth of a second, so it is done once in a process
//! for each file system.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::notice::{Notices, Topic};
use crate::config::EngineChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Comparison, Folder, IoEngine, PosixEngine, UringEngine, compare_engines};

/// File systems whose comparison is remembered.
const REMEMBERED_MAX: usize = 64;
/// Free space below which nothing is compared: many times what is written.
const SPACE_BYTES_MIN: u64 = 1 << 30;

/// An engine for a path, and why that one.
pub(super) type Chosen = (Arc<dyn IoEngine>, String);

/// Makes the engines of a store when they are first needed, each once.
pub(super) struct Engines {
    wish: EngineChoice,
    /// Used for every path, whatever the wish.
    given: Option<Arc<dyn IoEngine>>,
    threads: usize,
    on_start: Arc<dyn Fn() + Send + Sync>,
    notices: Arc<Notices>,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    posix: Option<Arc<dyn IoEngine>>,
    /// Or why there can be none.
    uring: Option<Result<Arc<dyn IoEngine>, String>>,
}

impl Engines {
    pub(super) fn new(
        wish: EngineChoice,
        given: Option<Arc<dyn IoEngine>>,
        threads: usize,
        on_start: Arc<dyn Fn() + Send + Sync>,
        notices: Arc<Notices>,
    ) -> Self {
        Self {
            wish,
            given,
            threads,
            on_start,
            notices,
            made: Mutex::default(),
        }
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn posix(&self) -> Result<Arc<dyn IoEngine>> {
        let mut made = self.made();
        if let Some(engine) = &made.posix {
            return Ok(Arc::clone(engine));
        }
        let engine: Arc<dyn IoEngine> =
            Arc::new(PosixEngine::new(self.threads, Arc::clone(&self.on_start))?);
        made.posix = Some(Arc::clone(&engine));
        Ok(engine)
    }

    fn uring(&self) -> Result<Arc<dyn IoEngine>, String> {
        let mut made = self.made();
        let engine = made.uring.get_or_insert_with(|| {
            UringEngine::new(self.threads, Arc::clone(&self.on_start))
                .map(|engine| Arc::new(engine) as Arc<dyn IoEngine>)
                .map_err(|error| error.to_string())
        });
        engine.clone()
    }

    /// Returns the engine that a path is tried with first.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the system gives no thread.
    pub(super) fn first(&self) -> Result<Chosen> {
        if let Some(engine) = &self.given {
            return Ok((Arc::clone(engine), "given by the caller".into()));
        }
        match self.wish {
            EngineChoice::Auto => Ok((self.posix()?, "not compared".into())),
            EngineChoice::Posix => Ok((self.posix()?, "io_engine is posix".into())),
            EngineChoice::Uring => match self.uring() {
                Ok(engine) => Ok((engine, "io_engine is uring".into())),
                Err(reason) => self.instead(&reason),
            },
        }
    }

    /// Returns what moves the bytes where io_uring was asked for and does not work, and says so.
    pub(super) fn instead(&self, reason: &str) -> Result<Chosen> {
        self.notices.warn(Topic::Engine, || {
            format!("io_engine is uring, but posix moves the bytes: {reason}")
        });
        Ok((self.posix()?, format!("io_engine is uring, but {reason}")))
    }

    /// Returns whether the wish was io_uring, and the engine is.
    pub(super) fn is_wished_uring(&self, engine: &dyn IoEngine) -> bool {
        self.given.is_none() && self.wish == EngineChoice::Uring && engine.name() == "uring"
    }

    /// Chooses for a path that `first` works on, by measuring in one of its folders.
    pub(super) fn choose(
        &self,
        first: Chosen,
        folder: &Folder,
        file_name: &str,
        direct: bool,
    ) -> Chosen {
        if self.given.is_some() || self.wish != EngineChoice::Auto {
            return first;
        }
        let (posix, _) = first;
        let uring = match self.uring() {
            Ok(uring) => uring,
            Err(reason) => return (posix, reason),
        };
        let device = device(folder);
        if let Some(found) = device.and_then(|device| remembered(device, direct)) {
            return decided(posix, uring, found);
        }
        if let Err(reason) = has_space(folder) {
            return (posix, reason);
        }
        match compare_engines(&*posix, &*uring, folder, file_name, direct) {
            Ok(found) => {
                if let Some(device) = device {
                    remember(device, direct, &found);
                }
                self.notices.info(Topic::Engine, || {
                    format!("{}: {}", folder.path().display(), found.reason)
                });
                decided(posix, uring, found)
            }
            Err(error) => {
                let reason = format!("uring could not be compared: {error}");
                if error.kind() == ErrorKind::Damaged {
                    self.notices.warn(Topic::Engine, || reason.clone());
                }
                (posix, reason)
            }
        }
    }

    /// Chooses for a path that nothing is written to: by what another store has measured there.
    pub(super) fn choose_unmeasured(
        &self,
        first: Chosen,
        folder: Option<&Folder>,
        direct: bool,
    ) -> Chosen {
        if self.given.is_some() || self.wish != EngineChoice::Auto {
            return first;
        }
        let found = folder
            .and_then(device)
            .and_then(|device| remembered(device, direct));
        match (found, first) {
            (Some(found), (posix, _)) if found.second_is_better => match self.uring() {
                Ok(uring) => decided(posix, uring, found),
                Err(reason) => (posix, reason),
            },
            (Some(found), (posix, _)) => (posix, found.reason),
            (None, (posix, _)) => (posix, "not compared where nothing is written".into()),
        }
    }
}

fn decided(posix: Arc<dyn IoEngine>, uring: Arc<dyn IoEngine>, found: Comparison) -> Chosen {
    match found.second_is_better {
        true => (uring, found.reason),
        false => (posix, found.reason),
    }
}

/// Returns the number of the file system that a folder is on.
fn device(folder: &Folder) -> Option<u64> {
    Some(std::fs::metadata(folder.path()).ok()?.dev())
}

fn has_space(folder: &Folder) -> Result<(), String> {
    let found = rustix::fs::fstatvfs(folder)
        .map_err(|errno| Error::io("statvfs", folder.path(), errno.into()).to_string())?;
    match found.f_bavail.saturating_mul(found.f_frsize) >= SPACE_BYTES_MIN {
        true => Ok(()),
        false => Err("not compared with uring: less than 1 GiB is free".into()),
    }
}

/// What was found out in this process, by file system and use of O_DIRECT.
static REMEMBERED: Mutex<Vec<(u64, bool, Comparison)>> = Mutex::new(Vec::new());

fn remembered(device: u64, direct: bool) -> Option<Comparison> {
    let known = REMEMBERED.lock().unwrap_or_else(PoisonError::into_inner);
    known
        .iter()
        .find(|(at, how, _)| (*at, *how) == (device, direct))
        .map(|(_, _, found)| found.clone())
}

fn remember(device: u64, direct: bool, found: &Comparison) {
    let mut known = REMEMBERED.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|(at, how, _)| (*at, *how) != (device, direct));
    if known.len() < REMEMBERED_MAX {
        known.push((device, direct, found.clone()));
    }
}
