//! Which engine moves the bytes of which path.
//!
//! What the user asks for is taken where it works; else what measures best on the file system,
//! and posix in case of doubt. Measuring takes a fifth of a second, so it is done once in a process
//! for each file system, when the store is open (see `comparisons`).

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::comparisons::MEANWHILE;
use super::notice::{Notices, Topic};
use crate::config::EngineChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Comparison, Folder, IoEngine, PosixEngine, UringEngine, compare_engines};

/// File systems whose comparison is remembered.
const REMEMBERED_MAX: usize = 64;
/// Free space below which nothing is compared: many times what is written.
const SPACE_BYTES_MIN: u64 = 1 << 30;
/// How often a comparison looks whether that of another store on the same file system has ended.
const TURN: Duration = Duration::from_millis(5);

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

    /// Chooses for a path that `first` works on, by what was measured on its file system. Returns
    /// whether that is still to be done, too, and the path starts with posix.
    pub(super) fn start_with(
        &self,
        first: Chosen,
        folder: &Folder,
        direct: bool,
    ) -> (Chosen, bool) {
        if self.given.is_some() || self.wish != EngineChoice::Auto {
            return (first, false);
        }
        let (posix, _) = first;
        match device(folder).and_then(|device| remembered(device, direct)) {
            Some(found) => (self.decided(&posix, found), false),
            None => ((posix, MEANWHILE.to_owned()), true),
        }
    }

    /// Chooses for a path by measuring in one of its folders, unless that was done meanwhile.
    pub(super) fn compare(
        &self,
        posix: &Arc<dyn IoEngine>,
        folder: &Folder,
        file_name: &str,
        direct: bool,
        goes_on: &dyn Fn() -> bool,
    ) -> Chosen {
        let stays = |reason: String| (Arc::clone(posix), reason);
        let uring = match self.uring() {
            Ok(uring) => uring,
            Err(reason) => return stays(reason),
        };
        let device = device(folder);
        let mut turn = None;
        while let Some(device) = device {
            turn = Turn::take(device, direct);
            if let Some(found) = remembered(device, direct) {
                return self.decided(posix, found);
            }
            if turn.is_some() {
                break;
            }
            if !goes_on() {
                return stays("uring could not be compared: another store is at it".to_owned());
            }
            std::thread::sleep(TURN);
        }
        if let Err(reason) = has_space(folder) {
            return stays(reason);
        }
        let compared = compare_engines(&**posix, &*uring, folder, file_name, direct, goes_on);
        let chosen = match compared {
            Ok(found) => {
                if let Some(device) = device {
                    remember(device, direct, &found);
                }
                self.decided(posix, found)
            }
            Err(error) => {
                let reason = format!("uring could not be compared: {error}");
                if error.kind() == ErrorKind::Damaged {
                    self.notices.warn(Topic::Engine, || reason.clone());
                }
                stays(reason)
            }
        };
        drop(turn);
        chosen
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
            (Some(found), (posix, _)) => self.decided(&posix, found),
            (None, (posix, _)) => (posix, "not compared where nothing is written".into()),
        }
    }

    fn decided(&self, posix: &Arc<dyn IoEngine>, found: Comparison) -> Chosen {
        if !found.second_is_better {
            return (Arc::clone(posix), found.reason);
        }
        match self.uring() {
            Ok(uring) => (uring, found.reason),
            Err(reason) => (Arc::clone(posix), reason),
        }
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

/// File systems that a comparison is under way on, and whether with O_DIRECT.
static COMPARED_NOW: Mutex<Vec<(u64, bool)>> = Mutex::new(Vec::new());

/// The only comparison of this process on a file system.
struct Turn {
    place: (u64, bool),
}

impl Turn {
    /// Returns `None` while somebody else has the turn.
    fn take(device: u64, direct: bool) -> Option<Self> {
        let place = (device, direct);
        let mut now = COMPARED_NOW.lock().unwrap_or_else(PoisonError::into_inner);
        if now.contains(&place) {
            return None;
        }
        now.push(place);
        Some(Self { place })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut now = COMPARED_NOW.lock().unwrap_or_else(PoisonError::into_inner);
        now.retain(|place| *place != self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_has_one_comparison_at_a_time() {
        let first = Turn::take(u64::MAX, true);
        assert!(first.is_some() && Turn::take(u64::MAX, true).is_none());
        assert!(Turn::take(u64::MAX, false).is_some(), "another question");
        drop(first);
        assert!(Turn::take(u64::MAX, true).is_some());
    }
}
