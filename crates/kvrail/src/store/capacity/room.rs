//! One store's own record, and the room that it claims for what it stores.
//!
//! Claims need no lock between stores. A store writes its claim into its record first, and reads
//! all records then: of two that claim at the same time at least one sees the other, so they never
//! both take the last room. Who finds the limit passed takes its claim back. Claims are made for
//! more than one chunk while there is plenty of room: all stores together hold at most 0.5% of the
//! limit that they do not use.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::account::{Place, Record, Sum, name_hash, read, read_all, signed};
use super::root::Root;
use super::stamp::milliseconds;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Folder;
use crate::store::publish::is_missing;
use crate::store::writer::Writer;

/// All stores together claim at most this part of the limit ahead.
const AHEAD_PART: u64 = 200;
/// A record is written again after this time even if nothing changed: others see the owner live.
const BEAT: Duration = Duration::from_secs(10);
/// After a refusal, claims are refused without asking for this long; eviction takes longer.
const REFUSED_FOR: Duration = Duration::from_millis(50);

/// The clock that tells the time of day; tests set it wrong on purpose.
pub type WallClock = fn() -> SystemTime;

/// A store's record and claims on one path.
#[derive(Debug)]
pub(super) struct Room {
    root: Root,
    /// Names the record; its own, since a store may be opened twice in one process.
    writer: Writer,
    limit: Option<u64>,
    clock: WallClock,
    own: Mutex<Own>,
    /// Bytes used as far as known, for the metrics; -1 before they are known.
    used: AtomicI64,
    /// Milliseconds by which the file system's clock is ahead of ours.
    offset: AtomicI64,
    /// Whether the janitor, if it is this process, makes room.
    evicting: AtomicBool,
}

#[derive(Debug)]
struct Own {
    name: String,
    record: Record,
    /// The record as it is on disk, once it is.
    written: Option<Record>,
    written_at: Option<Instant>,
    /// Where in its file that is; the next one goes to the other place.
    place: Place,
    /// Bytes claimed and not given to a chunk yet.
    left: u64,
    /// Bytes claimed for temp files that could not be removed.
    lingering: u64,
    /// How much to claim at once.
    portion: u64,
    refused_until: Option<Instant>,
}

impl Room {
    /// Makes the record's file, later where the disk is full. `is_new`: no chunk was in the directory
    /// before.
    pub(super) fn open(
        root: Root,
        limit: Option<u64>,
        clock: WallClock,
        is_new: bool,
    ) -> Result<Self> {
        let writer = Writer::new();
        let own = Own {
            name: writer.file_name("account"),
            record: Record {
                known: is_new,
                ..Record::default()
            },
            written: None,
            written_at: None,
            place: Place::default(),
            left: 0,
            lingering: 0,
            portion: 0,
            refused_until: None,
        };
        let room = Self {
            root,
            writer,
            limit,
            clock,
            own: Mutex::new(own),
            used: AtomicI64::new(-1),
            offset: AtomicI64::new(0),
            evicting: AtomicBool::new(false),
        };
        match room.write(&mut room.lock()) {
            // The janitor, which has work then, tries again.
            Err(error) if error.kind() == ErrorKind::NoSpace => {}
            written => written?,
        }
        Ok(room)
    }

    fn lock(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the name of the record's file, which names this store.
    pub(super) fn name(&self) -> String {
        self.lock().name.clone()
    }

    /// Returns the bytes used as of the last look, `None` before they are known.
    pub(super) fn used(&self) -> Option<u64> {
        u64::try_from(self.used.load(Ordering::Relaxed)).ok()
    }

    /// Returns the time by the file system's clock, in milliseconds since 1970.
    ///
    /// Hosts whose clocks differ agree on it where the file system's server sets the times.
    pub(super) fn now_milliseconds(&self) -> i64 {
        milliseconds((self.clock)()).saturating_add(self.offset.load(Ordering::Relaxed))
    }

    /// Claims room for `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when there is none, or when it is not known yet how much there is.
    pub(super) fn claim(&self, bytes: u64) -> Result<()> {
        let mut own = self.lock();
        if own.left >= bytes {
            own.left -= bytes;
            return Ok(());
        }
        let Some(limit) = self.limit else {
            own.record.claimed += bytes;
            return Ok(());
        };
        if own
            .refused_until
            .is_some_and(|until| Instant::now() < until)
        {
            return Err(self.refusal(bytes, limit));
        }
        let (portion, sum) = self.claim_ahead(&mut own, bytes)?;
        let stores = sum
            .records
            .iter()
            .filter(|named| !named.record.retired)
            .count() as u64;
        let missing = bytes - own.left;
        let free = (limit + portion).saturating_sub(sum.claimed);
        // Far from the limit as much as is allowed, close to it exactly what is needed.
        own.portion = (limit / AHEAD_PART).min(free / 4) / stores.max(1);
        let granted = match free {
            _ if !sum.known => 0,
            free if free >= portion => portion,
            free if free >= missing => missing,
            _ => 0,
        };
        own.record.claimed = own.record.claimed.saturating_sub(portion - granted);
        if granted > 0 {
            own.left = own.left + granted - bytes;
        }
        if granted < portion
            && let Err(error) = self.write(&mut own)
        {
            if granted > 0 {
                own.left += bytes;
            }
            return Err(error);
        }
        if granted == 0 {
            own.refused_until = Some(Instant::now() + REFUSED_FOR);
            return Err(self.refusal(bytes, limit));
        }
        Ok(())
    }

    /// Claims what is missing for `bytes`, or more where that is due, and looks what all have claimed
    /// then. Returns how much was claimed.
    fn claim_ahead(&self, own: &mut Own, bytes: u64) -> Result<(u64, Sum)> {
        let mut portion = 0;
        loop {
            let more = own
                .portion
                .max(bytes.saturating_sub(own.left))
                .saturating_sub(portion);
            portion += more;
            own.record.claimed = own.record.claimed.saturating_add(more);
            match self.write(own).and_then(|()| self.look()) {
                // Else the record was begun again, and what was left of the one before is gone.
                Ok(sum) if own.left + portion >= bytes => return Ok((portion, sum)),
                Ok(_) => {}
                Err(error) => {
                    own.record.claimed = own.record.claimed.saturating_sub(portion);
                    return Err(error);
                }
            }
        }
    }

    fn refusal(&self, bytes: u64, limit: u64) -> Error {
        let message = match self.used() {
            Some(used) => {
                format!("{used} bytes are stored, max_size is {limit}, {bytes} more do not fit")
            }
            None => format!("max_size is {limit}, and what is stored is not counted yet"),
        };
        Error::new(ErrorKind::NoSpace, message).with_path(self.root.path())
    }

    /// Notes whether room is being made.
    pub(super) fn set_evicting(&self, evicting: bool) {
        self.evicting.store(evicting, Ordering::Relaxed);
    }

    /// Returns whether room is being made by this process.
    pub(super) fn is_evicting(&self) -> bool {
        self.evicting.load(Ordering::Relaxed)
    }

    /// Notes that a chunk was stored in the room claimed for it.
    pub(super) fn stored(&self, bytes: u64) {
        self.lock().record.stored += bytes;
    }

    /// Gives back the room that was claimed for a chunk that was not stored.
    pub(super) fn unclaim(&self, bytes: u64) {
        let mut own = self.lock();
        if self.limit.is_some() {
            own.left += bytes;
        } else {
            own.record.claimed = own.record.claimed.saturating_sub(bytes);
        }
    }

    /// Claims, whether there is room or not, what lies there and could not be removed; `bytes` says
    /// how much that is now.
    pub(super) fn set_lingering(&self, bytes: impl FnOnce() -> u64) {
        let mut own = self.lock();
        let bytes = bytes();
        let claimed = own.record.claimed.saturating_add(bytes);
        own.record.claimed = claimed.saturating_sub(own.lingering);
        own.lingering = bytes;
    }

    /// Notes that chunks were removed.
    pub(super) fn removed(&self, bytes: u64) {
        self.lock().record.removed += bytes;
    }

    /// Takes that back.
    pub(super) fn not_removed(&self, bytes: u64) {
        let mut own = self.lock();
        own.record.removed = own.record.removed.saturating_sub(bytes);
    }

    /// Adds to the sum what counting has found, which is known from now on.
    pub(super) fn correct(&self, bytes: i64) {
        let mut own = self.lock();
        own.record.correction = own.record.correction.saturating_add(bytes);
        own.record.known = true;
    }

    /// Takes another record to absorb it: gives its file a name of this store's, which only one can
    /// do. Returns the name and what the record says; nothing when somebody else was quicker.
    ///
    /// It goes on to count under that name until it is absorbed. Should this store die meanwhile,
    /// the next janitor takes it as it takes the others of this store.
    pub(super) fn take(&self, folder: &Folder, name: &str) -> Result<Option<(String, Record)>> {
        let taken = self.writer.file_name("taken");
        match folder.rename(name, folder, &taken) {
            Ok(()) => {}
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        // Read again: its owner may have written to it until now.
        Ok(read(folder, &taken)?.map(|record| (taken, record)))
    }

    /// Takes over another record's amounts; its file is left out of sums from then on.
    pub(super) fn absorb(&self, name: &str, other: &Record) -> Result<()> {
        let mut own = self.lock();
        let before = own.record;
        let record = &mut own.record;
        // Claims that were not used when the owner ended: there may be a chunk behind them, or a
        // temp file. Taken for stored, they are found out by a count.
        record.claimed = record.claimed.saturating_add(other.claimed);
        record.stored = record.stored.saturating_add(other.claimed);
        record.removed = record.removed.saturating_add(other.removed);
        record.correction = record.correction.saturating_add(other.correction);
        record.known |= other.known;
        record.absorbed = name_hash(name);
        let written = self.write(&mut own);
        if written.is_err() {
            own.record = before;
        }
        written
    }

    /// Writes the record if it changed, or if it is time to show that the owner lives.
    pub(super) fn flush(&self) -> Result<()> {
        let mut own = self.lock();
        let quiet = own.written_at.is_some_and(|at| at.elapsed() < BEAT);
        if quiet && own.written == Some(own.record) {
            return Ok(());
        }
        self.write(&mut own)
    }

    /// Says that chunks will be removed by a tool: until it is done, what a count finds missing is
    /// left for it to tell.
    pub(super) fn begin_removing(&self) -> Result<()> {
        let mut own = self.lock();
        own.record.removing = true;
        self.write(&mut own)
    }

    /// Writes the record for the last time: claims that were not used are given back.
    pub(super) fn retire(&self) -> Result<()> {
        let mut own = self.lock();
        own.record.claimed = own.record.claimed.saturating_sub(own.left);
        own.left = 0;
        own.record.retired = true;
        own.record.removing = false;
        self.write(&mut own)
    }

    /// Sums all records up.
    pub(super) fn look(&self) -> Result<Sum> {
        let sum = read_all(&self.root.accounts()?)?;
        let used = if sum.known { signed(sum.used) } else { -1 };
        self.used.store(used, Ordering::Relaxed);
        Ok(sum)
    }

    fn write(&self, own: &mut Own) -> Result<()> {
        own.record.beat += 1;
        let create = own.written.is_none();
        let place = own.place.other();
        let written = self.root.accounts().and_then(|folder| {
            own.record.write(&folder, &own.name, place, create)?;
            Ok(folder)
        });
        let folder = match written {
            Ok(folder) => folder,
            Err(error) if is_missing(&error) && !create => self.begin_again(own)?,
            Err(error) if is_missing(&error) => {
                let folder = self.root.make_accounts()?;
                own.record.write(&folder, &own.name, place, true)?;
                folder
            }
            Err(error) => return Err(error),
        };
        own.place = place;
        own.written = Some(own.record);
        own.written_at = Some(Instant::now());
        self.set_clock(&folder, &own.name);
        Ok(())
    }

    /// Starts another record: this one was absorbed, since its owner seemed dead, or somebody
    /// removed the folder. What was written down is with whoever absorbed it.
    ///
    /// Nothing has changed when it fails: it is tried again and again while a path is away.
    fn begin_again(&self, own: &mut Own) -> Result<Folder> {
        let gone = own.written.unwrap_or_default();
        let record = Record {
            claimed: own.record.claimed.saturating_sub(gone.claimed),
            // Absorbing took the claims for stored.
            stored: own.record.stored.saturating_sub(gone.claimed),
            removed: own.record.removed.saturating_sub(gone.removed),
            correction: own.record.correction.saturating_sub(gone.correction),
            absorbed: 0,
            known: false,
            ..own.record
        };
        let name = self.writer.file_name("account");
        let folder = match self.root.accounts() {
            // Others' accounts are here, on whatever number the file system has by now.
            Ok(folder) => folder,
            Err(_) => self.root.make_accounts()?,
        };
        record.write(&folder, &name, own.place.other(), true)?;
        own.record = record;
        own.name = name;
        own.left = 0;
        own.lingering = 0;
        Ok(folder)
    }

    /// Compares our clock with the one that the file was just written by.
    fn set_clock(&self, folder: &Folder, name: &str) {
        if let Ok(Some(status)) = folder.status(name) {
            let there = milliseconds(status.modified);
            let here = milliseconds((self.clock)());
            self.offset.store(there - here, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
