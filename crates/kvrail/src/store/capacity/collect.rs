//! One pass on request, for tools: what `kvrail gc` does.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::account::signed;
use super::files::{FileShelf, found_or_none};
use super::room::Room;
use super::root::Root;
use super::stamp::whole_milliseconds;
use super::sweep::{Reason, SLICES, Situation, SweepRules, Sweeper, Tally, Visit};
use super::telling;
use crate::config::EvictionPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Folder, Observer};
use crate::store::directory::{MANIFEST_NAME, QUARANTINE_NAME};
use crate::store::quarantine;

/// What is to be removed.
#[derive(Debug, Clone, Default)]
pub struct CollectOptions {
    /// Only in the namespace with this directory name. Default: in all.
    pub namespace: Option<String>,
    /// Least recently used chunks, until no more than this many bytes are left.
    pub to_bytes: Option<u64>,
    /// Chunks and quarantined files that were not used for longer.
    pub older_than: Option<Duration>,
    /// Whether everything is only counted.
    pub dry_run: bool,
    /// Told of each change of what is on disk; for tests.
    pub observer: Option<Observer>,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Chunks that were there.
    pub found: Tally,
    /// Chunks removed because they were older than asked for.
    pub removed_for_age: Tally,
    /// Chunks removed because there were more bytes than asked for.
    pub removed_for_size: Tally,
    /// Chunks that are still there.
    pub left: Tally,
    /// Quarantined files removed.
    pub quarantined_removed: Tally,
    /// Temp files of dead writers removed.
    pub leftovers_removed: u64,
    /// Empty folders removed.
    pub folders_removed: u64,
    /// Bytes by which the account of the directory was wrong, and is corrected.
    pub account_corrected_bytes: i64,
}

/// Removes from the store at `root` what the options name, leftovers and empty folders.
///
/// May run beside stores and janitors: to remove what another one removed is no error.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] when `root` is no store or has no such namespace, else those of
/// the file system.
pub fn collect(root: &Path, options: &CollectOptions) -> Result<Collected> {
    let place = Root::existing(root).observed(options.observer.clone());
    let mut shelf = FileShelf::new(place.clone(), options.namespace.clone());
    let namespaces = shelf.namespaces()?;
    if namespaces.is_empty() {
        let message = match &options.namespace {
            Some(name) => format!("the store has no namespace `{name}`"),
            None => format!("not a kvrail store: no folder in it has a {MANIFEST_NAME}"),
        };
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(root));
    }
    shelf.refresh()?;
    shelf.dry_run = options.dry_run;
    shelf.by_request = true;
    // Without an account there would be no file system's clock, and no trace of what is removed.
    let room = match options.dry_run {
        true => None,
        false => Some(Room::open(place, None, SystemTime::now, false)?),
    };
    room.as_ref().map(Room::begin_removing).transpose()?;
    let now = room.as_ref().map_or_else(
        || super::stamp::milliseconds(SystemTime::now()),
        Room::now_milliseconds,
    );
    shelf.now_milliseconds = now;
    let mut collected = Collected::default();
    let seen = remove_old(&mut shelf, options, now, room.as_ref(), &mut collected)?;
    if let Some(to_bytes) = options.to_bytes {
        remove_beyond(&mut shelf, to_bytes, now, room.as_ref(), &mut collected)?;
    }
    for namespace in &namespaces {
        if let Some(age) = options.older_than {
            let removed = &mut collected.quarantined_removed;
            remove_quarantined(&namespace.folder, age, room.as_ref(), removed)?;
        }
    }
    if let Some(room) = room {
        let leftovers = shelf.remove_leftovers()?;
        collected.leftovers_removed = leftovers.removed;
        collected.folders_removed = shelf.remove_empty_folders()?;
        room.flush()?;
        let sum = room.look()?;
        let quarantined = shelf.quarantined()?;
        let beside = quarantined.kept.bytes + leftovers.kept_bytes;
        let counted = signed(seen.kept.bytes + beside) - signed(collected.removed_for_size.bytes);
        let drift = counted - sum.said;
        // What others store or remove while this counts would be taken for drift. Too much said is
        // harmless, and small differences are left to the janitor; but room is given back only when
        // nobody else is there to fill it, or what a store writes meanwhile would have no room.
        let own = room.name();
        let mut others = sum.records.iter().filter(|named| named.name != own);
        let is_alone = others.all(|named| named.record.retired);
        let is_alone = is_alone && seen.unseen + quarantined.unseen == 0;
        let is_drift = drift.unsigned_abs() > sum.used / 100 && (drift > 0 || is_alone);
        if options.namespace.is_none() && (is_drift || !sum.known) {
            room.correct(drift);
            collected.account_corrected_bytes = drift;
        }
        room.retire()?;
    }
    Ok(collected)
}

/// Counts everything and removes what is too old. Returns what was found and removed.
fn remove_old(
    shelf: &mut FileShelf,
    options: &CollectOptions,
    now: i64,
    room: Option<&Room>,
    collected: &mut Collected,
) -> Result<Visit> {
    let rules = SweepRules {
        policy: EvictionPolicy::Lru,
        low_watermark: 1.0,
        ttl_milliseconds: options.older_than.map(whole_milliseconds),
    };
    let mut sweeper = Sweeper::new(rules, 0);
    let situation = Situation {
        now_milliseconds: now,
        used_bytes: 0,
        limit_bytes: None,
        reason: Reason::Size,
        flow_bytes: 0,
    };
    let mut seen = Visit::default();
    for _ in 0..SLICES {
        let visit = step(&mut sweeper, shelf, &situation, room)?;
        seen.add_all(&visit);
    }
    collected.removed_for_age = seen.for_age;
    collected.left = seen.kept;
    collected.found = Tally {
        chunks: seen.kept.chunks + seen.for_age.chunks,
        bytes: seen.kept.bytes + seen.for_age.bytes,
    };
    Ok(seen)
}

/// Removes the oldest until no more than `to_bytes` are left.
fn remove_beyond(
    shelf: &mut FileShelf,
    to_bytes: u64,
    now: i64,
    room: Option<&Room>,
    collected: &mut Collected,
) -> Result<()> {
    let rules = SweepRules {
        policy: EvictionPolicy::Lru,
        // Both marks are the limit itself.
        low_watermark: 1.0,
        ttl_milliseconds: None,
    };
    let mut sweeper = Sweeper::new(rules, now.unsigned_abs());
    loop {
        let situation = Situation {
            now_milliseconds: now,
            used_bytes: collected.left.bytes,
            limit_bytes: Some(to_bytes),
            reason: Reason::Size,
            flow_bytes: 0,
        };
        if collected.left.bytes <= to_bytes || sweeper.is_stuck() {
            return Ok(());
        }
        let visit = step(&mut sweeper, shelf, &situation, room)?;
        let removed = visit.for_size;
        collected.removed_for_size.chunks += removed.chunks;
        collected.removed_for_size.bytes += removed.bytes;
        collected.left.chunks = collected.left.chunks.saturating_sub(removed.chunks);
        collected.left.bytes = collected.left.bytes.saturating_sub(removed.bytes);
    }
}

/// Visits the next slice, and writes down what was removed, at once: a janitor that counts meanwhile
/// would take it off twice.
fn step(
    sweeper: &mut Sweeper,
    shelf: &mut FileShelf,
    situation: &Situation,
    room: Option<&Room>,
) -> Result<Visit> {
    let began = Instant::now();
    let step = sweeper.step(shelf, situation);
    let bytes = step.visit.removed().bytes;
    if let Some(room) = room.filter(|_| bytes > 0) {
        telling::removed(room, bytes, began)?;
    }
    step.error.map_or(Ok(step.visit), Err)
}

/// Removes what was set aside long ago, and writes each down at once; without a room it is only
/// counted. What cannot be removed stays.
fn remove_quarantined(
    namespace: &Folder,
    age: Duration,
    room: Option<&Room>,
    removed: &mut Tally,
) -> Result<()> {
    let Some(folder) = found_or_none(namespace.folder(QUARANTINE_NAME))? else {
        return Ok(());
    };
    for name in quarantine::list(&folder)? {
        let status = folder.status(name.to_string())?;
        let Some(status) = status.filter(|status| status.is_file) else {
            continue;
        };
        let since = SystemTime::now().duration_since(status.modified);
        if since.is_err() || since.is_ok_and(|since| since <= age) {
            continue;
        }
        if let Some(room) = room {
            let began = Instant::now();
            if quarantine::remove(&folder, &name).is_err() {
                continue;
            }
            telling::removed(room, status.bytes, began)?;
        }
        removed.add(status.bytes);
    }
    Ok(())
}
