//! The janitor of one path: keeps the account right and the directory below its limits.
//!
//! Every store that may write runs one; the holder of the [`Lease`] works, the others watch. The
//! work goes slice by slice: slowly in a rolling pass that counts everything and removes what is
//! too old, and without pause while there is too much.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::absorber::Absorber;
use super::account::{Sum, signed};
use super::files::FileShelf;
use super::lease::Lease;
use super::progress::Progress;
use super::relief::{Relief, free_space};
use super::room::Room;
use super::root::Root;
use super::settings::JanitorSettings;
use super::stamp::whole_milliseconds;
use super::steps::{Step, reach};
use super::sweep::{Count, Reason, Situation, SweepRules, Sweeper, Visit};
use super::telling;
use crate::error::{Error, ErrorKind, Result};

/// How long eviction rests after a round that found nothing to remove.
const STUCK_FOR: Duration = Duration::from_secs(30);
/// How long a sum of all accounts and a look at the free space hold while slices are visited.
const SUM_HOLDS: Duration = Duration::from_millis(100);
/// The same for each account, where there are many: reading one is three operations.
const SUM_HOLDS_FOR_EACH: Duration = Duration::from_millis(2);
/// How rarely those that only watch sum all accounts up, for each of them: each store reads two
/// accounts a second, however many stores there are.
const LOOK_FOR_EACH: Duration = Duration::from_millis(500);
/// How long the list of folders holds.
const FOLDERS_HOLD: Duration = Duration::from_secs(1);
/// Chunks from which a part of a pass is enough to say how much there is: the sum of 50,000 chunks
/// of one size in random slices is 0.45% off (one standard deviation, `1 / sqrt(50000)`).
const ESTIMATE_CHUNKS: u64 = 50_000;
/// Part of the usage by which a count may differ from the account before the account is corrected:
/// a quarter of the 1% that it must be right to.
const DRIFT_PART: u64 = 400;
/// What a store may have stored before its record says so: the record is written each half second.
const RECORD_LAG: Duration = Duration::from_secs(2);

/// What came of a tick.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tick {
    /// Whether this janitor holds the lease.
    pub is_janitor: bool,
    /// What was removed, and what was seen.
    pub visit: Visit,
    /// Passes that ended.
    pub passes: u64,
    /// Leftover temp files removed.
    pub leftovers_removed: u64,
    /// Whether chunks must still go: the next tick should follow at once.
    pub busy: bool,
    /// Whether chunks must go, but a whole round found none that can be removed, or removing them
    /// frees nothing.
    pub stuck: bool,
}

/// The janitor of one path.
#[derive(Debug)]
pub struct Janitor {
    root: Root,
    room: Arc<Room>,
    settings: JanitorSettings,
    lease: Lease,
    shelf: FileShelf,
    sweeper: Sweeper,
    absorber: Absorber,
    view: Option<View>,
    refreshed: Option<Instant>,
    /// Bytes that this janitor has evicted and told: its own part is no flow, since it knows the slice.
    evicted: u64,
    /// Bytes that it has evicted, told or not.
    freed: u64,
    /// Bytes that are gone and still in the account, which could not be written.
    untold: u64,
    slice_due: Instant,
    /// When one that only watches sums all accounts up again.
    look_due: Instant,
    /// Flow, what others had removed, and time at the start of the pass.
    pass_start: Option<(i64, i64, Instant)>,
    relief: Relief,
    stuck_since: Option<Instant>,
    /// What went wrong in a tick that went on.
    fault: Option<Error>,
    progress: Arc<Progress>,
}

/// Usage and limits at one moment.
#[derive(Debug, Clone, Copy)]
struct View {
    at: Instant,
    holds: Duration,
    situation: Situation,
    used: u64,
    known: bool,
    is_removing: bool,
    /// Bytes that others have removed; only differences count.
    removed: i64,
}

impl View {
    /// Returns it after this janitor has removed so many bytes.
    fn less(mut self, bytes: u64) -> Self {
        self.used = self.used.saturating_sub(bytes);
        let used = &mut self.situation.used_bytes;
        *used = used.saturating_sub(bytes);
        self
    }
}

impl Janitor {
    /// Makes a janitor of its own for a path that exists, with its own account.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(root: &Path, settings: JanitorSettings) -> Result<Self> {
        let root = Root::existing(root).observed(settings.observer.clone());
        let is_new = super::has_no_chunks(&root);
        let room = Room::open(root.clone(), settings.max_size, settings.clock, is_new)?;
        let progress = Arc::default();
        Ok(Self::new(root, Arc::new(room), settings, progress))
    }

    /// Makes the janitor of a store that has an account.
    pub(super) fn new(
        root: Root,
        room: Arc<Room>,
        settings: JanitorSettings,
        progress: Arc<Progress>,
    ) -> Self {
        let name = room.name();
        let rules = SweepRules {
            policy: settings.policy,
            low_watermark: settings.low_watermark,
            ttl_milliseconds: settings.ttl.map(whole_milliseconds),
        };
        let seed = twox_hash::XxHash3_64::oneshot(name.as_bytes());
        Self {
            lease: Lease::new(root.clone(), name, settings.timing.lease_limit),
            shelf: FileShelf::new(root.clone(), None)
                .observed(settings.hook.clone(), Arc::clone(&progress)),
            sweeper: Sweeper::new(rules, seed),
            root,
            room,
            settings,
            absorber: Absorber::default(),
            view: None,
            refreshed: None,
            evicted: 0,
            freed: 0,
            untold: 0,
            slice_due: Instant::now(),
            look_due: Instant::now(),
            pass_start: None,
            relief: Relief::default(),
            stuck_since: None,
            fault: None,
            progress,
        }
    }

    /// Returns whether it holds the lease.
    pub fn is_janitor(&self) -> bool {
        self.lease.is_held()
    }

    /// Does what is due, for about one tick: the account first, then the lease, then slices.
    ///
    /// Nothing while the path is left alone; others take the lease over then, if theirs is well.
    ///
    /// # Errors
    /// Those of the file system; the next call begins anew.
    pub fn tick(&mut self) -> Result<Tick> {
        if self.progress.is_halted() {
            return Ok(Tick::default());
        }
        self.progress.step();
        let tick = self.work();
        self.progress.rest();
        tick
    }

    /// Takes the first thing that went wrong in the last tick and did not end it, such as a folder
    /// that cannot be read.
    pub fn take_fault(&mut self) -> Option<Error> {
        self.fault.take()
    }

    /// Goes on where a full disk takes no more of what is kept beside the chunks. What is removed
    /// makes room for it.
    fn unless_full(&mut self, done: Result<()>) -> Result<()> {
        match done {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.note(error);
                Ok(())
            }
            done => done,
        }
    }

    fn note(&mut self, fault: Error) {
        self.fault.get_or_insert(fault);
    }

    fn work(&mut self) -> Result<Tick> {
        let start = Instant::now();
        self.fault = None;
        let flushed = self.room.flush();
        self.unless_full(flushed)?;
        self.reach(Step::Accounted);
        let held = self.lease.is_held();
        if !self.lease.tend()? {
            if Instant::now() >= self.look_due {
                let stores = self.room.look()?.records.len();
                self.look_due = Instant::now() + LOOK_FOR_EACH * whole(stores);
            }
            return Ok(Tick::default());
        }
        if !held {
            self.begin();
        }
        self.reach(Step::Elected);
        let absorbed = self.absorb();
        self.unless_full(absorbed)?;
        let mut tick = Tick {
            is_janitor: true,
            ..Tick::default()
        };
        while start.elapsed() < self.settings.timing.tick && !self.progress.is_halted() {
            let view = self.view()?;
            // What fails in each slice keeps the account from being known, and is tried in its turn.
            let is_unknown = (!view.known || self.untold > 0) && self.fault.is_none();
            let is_late = Instant::now() >= self.slice_due || is_unknown;
            if !is_late && !self.sweeper.is_evicting() && !self.must_evict(&view) {
                break;
            }
            self.visit(&view, &mut tick)?;
        }
        let flushed = self.room.flush();
        self.unless_full(flushed)?;
        self.room.look()?;
        let is_stuck = self.sweeper.is_stuck();
        let since = *self.stuck_since.get_or_insert_with(Instant::now);
        if !is_stuck || since.elapsed() > STUCK_FOR {
            self.stuck_since = None;
            self.sweeper.retry();
        }
        let is_unknown = (self.room.used().is_none() || self.untold > 0) && self.fault.is_none();
        tick.busy = self.sweeper.is_evicting() || is_unknown;
        tick.stuck = is_stuck || self.relief.is_missing();
        Ok(tick)
    }

    /// Ends the work: gives back unused claims and the lease.
    pub fn close(mut self) {
        self.progress.step();
        // Both are found out by others when they cannot be written.
        drop(self.room.retire());
        self.reach(Step::Releasing);
        self.lease.release();
        self.progress.rest();
    }

    fn reach(&self, step: Step) {
        self.progress.step();
        reach(self.settings.hook.as_ref(), step);
    }

    fn absorb(&mut self) -> Result<()> {
        let (progress, hook) = (&self.progress, self.settings.hook.as_ref());
        let at = |step| {
            progress.step();
            reach(hook, step);
        };
        if self.absorber.absorb(&self.root, &self.room, at)? > 0 {
            self.view = None;
        }
        Ok(())
    }

    /// Forgets what was seen before the lease was held.
    fn begin(&mut self) {
        self.view = None;
        self.refreshed = None;
        self.pass_start = None;
        self.slice_due = Instant::now();
        self.sweeper.restart_count();
    }

    fn must_evict(&self, view: &View) -> bool {
        self.sweeper.begins_now(&view.situation)
    }

    /// Visits one slice.
    fn visit(&mut self, view: &View, tick: &mut Tick) -> Result<()> {
        self.progress.step();
        if self.sweeper.begins_now(&view.situation) {
            // What is to be removed may lie in folders that are new.
            self.refreshed = None;
        }
        self.refresh()?;
        self.shelf.now_milliseconds = view.situation.now_milliseconds;
        self.pass_start
            .get_or_insert((view.situation.flow_bytes, view.removed, Instant::now()));
        let began = Instant::now();
        let step = self.sweeper.step(&mut self.shelf, &view.situation);
        let pause = self.settings.timing.pass / u32::from(super::SLICES);
        self.slice_due = (self.slice_due + pause).max(Instant::now() - self.settings.timing.tick);
        let removed = step.visit.removed();
        if removed.chunks > 0 {
            self.reach(Step::Counted);
            // Usage has changed: what comes next must know.
            let view = self.view.take();
            self.freed += removed.bytes;
            match telling::removed(&self.room, removed.bytes, began) {
                Ok(true) => {
                    self.evicted += removed.bytes;
                    self.view = view.map(|view| view.less(removed.bytes));
                }
                Ok(false) => {}
                Err(error) => {
                    // Else what is gone would be evicted again, until nothing is left.
                    self.untold += removed.bytes;
                    self.note(error);
                }
            }
        }
        tick.visit.add_all(&step.visit);
        let count = self.sweeper.count();
        // One folder that fails stands in nobody's way.
        step.error.into_iter().for_each(|error| self.note(error));
        if let Some(pass) = step.pass {
            let ended = self.end_pass(pass, tick);
            self.unless_full(ended)?;
        } else if !view.known && count.found.chunks >= ESTIMATE_CHUNKS {
            self.settle(count, 0)?;
        }
        Ok(())
    }

    /// Looks for new and vanished folders now and then.
    fn refresh(&mut self) -> Result<()> {
        if self.refreshed.is_some_and(|at| at.elapsed() < FOLDERS_HOLD) {
            return Ok(());
        }
        if self.shelf.refresh()? {
            // A pass that missed a folder at first would count too little.
            self.sweeper.restart_count();
            self.sweeper.retry();
            self.pass_start = None;
        }
        self.refreshed = Some(Instant::now());
        Ok(())
    }

    /// Compares a whole pass with the account, and removes what dead writers left.
    fn end_pass(&mut self, pass: Count, tick: &mut Tick) -> Result<()> {
        tick.passes += 1;
        self.reach(Step::PassEnded);
        // What dead writers left goes before its room is given back.
        let leftovers = self.shelf.remove_leftovers()?;
        tick.leftovers_removed += leftovers.removed;
        let aside = self.shelf.quarantined()?;
        let beside = aside.kept.bytes + leftovers.kept_bytes;
        // The accounts last: who has removed something until now has said before that he would.
        self.room.flush()?;
        self.view = None;
        let view = self.view()?;
        let flow = view.situation.flow_bytes;
        let start = self.pass_start.take();
        let (start, removed, at) = start.unwrap_or((flow, view.removed, Instant::now()));
        // What was stored during the pass at this rate may not be in the records yet.
        let duration = at.elapsed().max(RECORD_LAG / 20);
        let others_removed = (view.removed - removed).max(0);
        // Both ways: what is stored and what is removed may cancel out, and lag all the same.
        let moved = (flow - start).unsigned_abs() + 2 * others_removed.unsigned_abs();
        let rate = moved as f64 / duration.as_secs_f64();
        let lag = (rate * RECORD_LAG.as_secs_f64()) as u64;
        let tolerance = lag + pass.error_bytes(flow) + view.used / DRIFT_PART;
        if view.known {
            let drift = signed(pass.total_bytes(flow).saturating_add(beside)) - signed(view.used);
            if drift > signed(tolerance) {
                self.room.correct(drift);
                self.untold = 0;
            } else if drift < -signed(tolerance) - others_removed
                && pass.unseen + aside.unseen == 0
                && !view.is_removing
                && pass.failed == 0
            {
                // Downwards with care: room that is not there must not be given away. What others
                // removed may have been missing before they said so, and is taken off twice then.
                let missing = drift + signed(tolerance - view.used / DRIFT_PART);
                if telling::missing(&self.room, missing, view.at)? {
                    self.untold = 0;
                }
            } else if drift >= -signed(tolerance) {
                self.untold = 0;
            }
        } else {
            self.settle(pass, beside)?;
        }
        self.room.flush()
    }

    /// Makes the account known from a count and the bytes `beside` chunks in their places.
    fn settle(&mut self, count: Count, beside: u64) -> Result<()> {
        self.room.flush()?;
        let sum = self.room.look()?;
        let total = count.total_bytes(self.flow(&sum)).saturating_add(beside);
        self.room.correct(signed(total) - sum.said);
        self.room.flush()?;
        self.untold = 0;
        self.view = None;
        Ok(())
    }

    /// Returns what others have stored less what others have removed.
    fn flow(&self, sum: &Sum) -> i64 {
        let flow: i64 = sum
            .records
            .iter()
            .map(|named| signed(named.record.stored) - signed(named.record.removed))
            .sum();
        flow + signed(self.evicted)
    }

    /// Returns usage and limits, looked up again after a while.
    fn view(&mut self) -> Result<View> {
        if let Some(view) = self.view.filter(|view| view.at.elapsed() < view.holds) {
            return Ok(view);
        }
        let sum = self.room.look()?;
        let holds = SUM_HOLDS.max(SUM_HOLDS_FOR_EACH * whole(sum.records.len()));
        let flow_bytes = self.flow(&sum);
        let records = sum.records.iter();
        let removed: i64 = records.map(|named| signed(named.record.removed)).sum();
        let (available, reserve) = free_space(self.root.path(), self.settings.min_free)?;
        let relieved = self.relief.is_seen(available, self.freed, flow_bytes);
        let claimed = sum.claimed.saturating_sub(self.untold);
        let by_space = relieved
            .then(|| (claimed + available).saturating_sub(reserve))
            .filter(|_| reserve > 0);
        let (limit_bytes, reason) = match (self.settings.max_size, by_space) {
            (Some(size), Some(space)) if space < size => (Some(space), Reason::Space),
            (None, Some(space)) => (Some(space), Reason::Space),
            (size, _) => (size, Reason::Size),
        };
        let view = View {
            at: Instant::now(),
            holds,
            situation: Situation {
                now_milliseconds: self.room.now_milliseconds(),
                used_bytes: claimed,
                // What is not known to be too much is not removed.
                limit_bytes: limit_bytes.filter(|_| sum.known),
                reason,
                flow_bytes,
            },
            used: sum.used,
            known: sum.known,
            is_removing: sum.removing,
            removed: removed - signed(self.evicted),
        };
        if reason == Reason::Space {
            self.relief.watch(available, self.freed, flow_bytes);
        } else {
            self.relief.unwatch();
        }
        self.view = Some(view);
        Ok(view)
    }
}

fn whole(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
