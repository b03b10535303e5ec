//! Capacity: how much a directory may hold, what goes when it is too much, and who sees to it.
//!
//! - `stamp`, `policy`, `ages`, `seen`, `sweep`: which chunks go, as pure code that simulations
//!   share with the store ([`Shelf`] is where chunks lie)
//! - `root`, `account`, `room`: how many bytes there are, as a sum of what each store says, and claims
//! - `lease`, `janitor`, `files`: who evicts, and the directory as a shelf
//! - `thread`, `progress`: the janitors of a store, and what happens when one hangs
//! - `eviction_log`: what was evicted lately
//! - `touch`, `chain`: what a use does to a chunk's stamp
//! - `collect`, `removals`: one pass on request, and removal by other means, for tools
//!
//! docs/capacity.md says how it works together.

mod absorber;
mod account;
mod ages;
mod chain;
mod collect;
mod eviction_log;
mod files;
mod janitor;
mod lease;
mod pending_use;
mod policy;
mod progress;
mod relief;
mod removals;
mod room;
mod root;
mod seen;
mod settings;
mod stamp;
mod steps;
mod sweep;
mod telling;
mod thread;
mod touch;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

pub use ages::{AgeSample, SAMPLE_MAX};
pub use collect::{CollectOptions, Collected, collect};
pub(super) use eviction_log::LOG_NAMES;
pub use eviction_log::{Eviction, EvictionReason, evictions};
pub use janitor::{Janitor, Tick};
pub(super) use pending_use::PendingUse;
pub use removals::Removals;
pub use room::WallClock;
pub use seen::SeenChunks;
pub use settings::{JanitorSettings, JanitorTiming};
pub use stamp::{Stamp, USES_MAX};
pub use steps::{Step, StepHook};
pub use sweep::{
    Count, Reason, SLICES, Shelf, Situation, Step as SweepStep, SweepRules, Sweeper, Tally, Visit,
};
pub(super) use thread::JanitorThreads;
pub(super) use touch::{Use, is_parent_pending, now_on_path, plan_use};

use super::mount::Mount;
use super::notice::{Notices, Topic};
use crate::chunk::ChunkKey;
use crate::config::{Admission, StoreConfig};
use crate::error::Result;
use crate::io::{Folder, Permissions, within};
use crate::store::directory::parse_part_name;
use account::read_all;
use chain::Chains;
use progress::Progress;
use room::Room;
use root::Root;
pub(super) use root::STATE_NAME;

/// What a store keeps about the capacity of its paths.
#[derive(Debug)]
pub(super) struct Capacity {
    paths: Vec<PathCapacity>,
    chains: Chains,
    admission: Admission,
    seen: Mutex<SeenChunks>,
}

/// The account of one path that is written to.
#[derive(Debug)]
pub(super) struct PathCapacity {
    root: Root,
    room: Arc<Room>,
    settings: JanitorSettings,
    is_janitor: AtomicBool,
    progress: Arc<Progress>,
}

impl Capacity {
    /// Opens the accounts of the paths that can be written to.
    ///
    /// One that cannot be opened leaves its path without a limit when none is configured, and
    /// without stores when there is one.
    pub(super) fn open(
        config: &StoreConfig,
        mounts: &[Arc<Mount>],
        notices: &Notices,
    ) -> Result<Self> {
        let limit = Duration::from_secs_f64(config.wait_limit_seconds);
        let mut paths = Vec::new();
        for mount in mounts.iter().filter(|mount| mount.report.writable) {
            let settings = JanitorSettings::new(config);
            let (path, max_size, clock) = (mount.root.clone(), config.max_size, settings.clock);
            let permissions = Permissions::of_files(config.file_mode.bits());
            let opened = within(limit, "opening the account", move || {
                let root = Root::new(&path, permissions);
                let is_new = has_no_chunks(&root);
                Room::open(root.clone(), max_size, clock, is_new).map(|room| (root, room))
            });
            match opened.and_then(|opened| opened) {
                Ok((root, room)) => paths.push(PathCapacity {
                    root,
                    room: Arc::new(room),
                    settings,
                    is_janitor: AtomicBool::new(false),
                    progress: Arc::default(),
                }),
                Err(error) if config.max_size.is_some() => return Err(error),
                Err(error) => notices.warn(Topic::Capacity, || {
                    format!("no account is kept of what is stored, nothing is evicted: {error}")
                }),
            }
        }
        Ok(Self {
            paths,
            chains: Chains::default(),
            admission: config.admission,
            seen: Mutex::default(),
        })
    }

    fn of(&self, root: &Path) -> Option<&PathCapacity> {
        self.paths.iter().find(|path| path.root.path() == root)
    }

    /// Takes a path out of use when a step of its janitor is not done within `limit`, and halts the
    /// janitors of paths that are out.
    pub(super) fn watch(&self, mounts: &[Arc<Mount>], limit: Duration) {
        for mount in mounts {
            let Some(path) = self.of(&mount.root) else {
                continue;
            };
            if let Some(took) = path.progress.overdue(limit) {
                let seconds = took.as_secs_f64();
                let message = format!("a step of the janitor was not done within {seconds:.3} s");
                mount.health.note_hung(&mount.root, message);
            }
            path.progress.set_halted(mount.health.is_out());
        }
    }

    /// Returns whether a chunk should be stored on a path. Notes that it was asked for.
    pub(super) fn admits(&self, mount: &Mount, key: &ChunkKey) -> bool {
        if self.admission == Admission::All {
            return true;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.show(key.as_bytes()) || !self.of(&mount.root).is_some_and(PathCapacity::is_short)
    }

    /// Claims room for a chunk's file on a path.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace) when `max_size` leaves none.
    pub(super) fn claim(&self, root: &Path, bytes: u64) -> Result<Claim<'_>> {
        let room = self.of(root).map(|path| &*path.room);
        if let Some(room) = room {
            room.claim(bytes)?;
        }
        Ok(Claim { room, bytes })
    }

    /// Claims the room of temp files on a path that could not be removed, and gives back that of
    /// those that are gone since.
    pub(super) fn keep_lingering(&self, mount: &Mount) {
        if let Some(path) = self.of(&mount.root) {
            path.room
                .set_lingering(|| mount.directory.lingering.bytes());
        }
    }

    /// Returns the bytes in use on all paths, as far as they are known, and the paths whose
    /// janitor this store is.
    pub(super) fn gauges(&self) -> (u64, u64) {
        let used = self.paths.iter().filter_map(|path| path.room.used()).sum();
        let held = self
            .paths
            .iter()
            .filter(|path| path.is_janitor.load(Ordering::Relaxed));
        (used, held.count() as u64)
    }
}

impl PathCapacity {
    /// Returns whether eviction makes room on this path, or is close to.
    fn is_short(&self) -> bool {
        let watermark = self.settings.low_watermark;
        let limit = self
            .settings
            .max_size
            .map(|limit| (limit as f64 * watermark) as u64);
        let by_size = limit.is_some_and(|limit| self.room.used().is_some_and(|used| used > limit));
        by_size || self.room.is_evicting()
    }
}

/// Room for one chunk; given back unless the chunk is stored.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    room: Option<&'a Room>,
    bytes: u64,
}

impl Claim<'_> {
    /// Notes that the chunk is there.
    pub(super) fn stored(mut self) {
        if let Some(room) = self.room.take() {
            room.stored(self.bytes);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(room) = self.room {
            room.unclaim(self.bytes);
        }
    }
}

/// Returns whether nothing was ever stored below a path: no namespace has a group's folder.
///
/// Looks at names only, and at no more of them than there are namespaces.
fn has_no_chunks(root: &Root) -> bool {
    let has_none = |folder: &Folder| -> Result<bool> {
        let is_of_a_rank = |name: &String| parse_part_name(name).is_some();
        for name in files::names(folder)? {
            if let Some(namespace) = files::found_or_none(folder.folder(name))?
                && files::names(&namespace)?.iter().any(is_of_a_rank)
            {
                return Ok(false);
            }
        }
        Ok(true)
    };
    // What cannot be read may hold chunks: the janitor counts then.
    root.open()
        .and_then(|folder| has_none(&folder))
        .unwrap_or(false)
}

/// What the accounts of a directory say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes of all chunk files, those in quarantine included; `None` when it was not counted yet.
    pub bytes: Option<u64>,
    /// Bytes that stores have claimed and not used yet.
    pub claimed_ahead_bytes: u64,
    /// Stores that keep an account.
    pub stores: usize,
}

/// Returns what is stored below a path of `gds_path`, without looking at chunks.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the accounts cannot be read; a directory that was
/// never opened to store has none.
pub fn usage(root: &Path) -> Result<Usage> {
    let sum = read_all(&Root::existing(root).accounts()?)?;
    let is_open = |named: &&account::NamedRecord| !named.record.retired;
    Ok(Usage {
        bytes: sum.known.then_some(sum.used),
        claimed_ahead_bytes: sum.claimed.saturating_sub(sum.used),
        stores: sum.records.iter().filter(is_open).count(),
    })
}
