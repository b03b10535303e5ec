//! The order in which chunks are visited, and which of them go: code without files or clocks.
//!
//! A store has 4,096 slices: the chunks whose keys begin with the same three hex digits, of all
//! namespaces, groups and ranks. Keys are hashes, so each slice is a random sample of the store.
//! A pass visits one slice after the other; counting all of them tells how much there is. When
//! there is too much, slices are visited until [`AgeSample`] knows the age from which on chunks
//! must go, then further slices lose what is older, until enough is gone. No chunk is looked at
//! twice for it, and nothing is kept of a chunk but its place in the sample.

use super::ages::{AgeSample, SAMPLE_MAX};
use super::stamp::Stamp;
use crate::config::EvictionPolicy;
use crate::error::{Error, Result};

/// Slices of a store: as many as its folders `000` to `fff`.
pub const SLICES: u16 = 4096;
/// Slices of a pass that may fail: the others say how much there is well enough, as keys are hashes.
const FAILED_MAX: u16 = SLICES / 64;

/// Why a chunk is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The directory holds more than `max_size` allows.
    Size,
    /// The file system has less free space than `min_free` asks for.
    Space,
    /// Nobody used it for `ttl`.
    Age,
}

/// Where chunks lie: files, or a simulation of them.
pub trait Shelf {
    /// Visits every chunk of a slice with its stamp and bytes, and removes those for which `judge`
    /// gives a reason. What was found and removed is added to `visit`.
    ///
    /// # Errors
    /// What keeps a part of the slice from being visited; a chunk that cannot be removed counts as
    /// kept.
    fn visit(
        &mut self,
        slice: u16,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> Result<()>;
}

/// Number and bytes of chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// Chunks.
    pub chunks: u64,
    /// Their files' bytes.
    pub bytes: u64,
}

impl Tally {
    /// Counts one chunk.
    pub fn add(&mut self, bytes: u64) {
        self.chunks += 1;
        self.bytes += bytes;
    }

    fn add_all(&mut self, other: Self) {
        self.chunks += other.chunks;
        self.bytes += other.bytes;
    }
}

/// What a visit found and did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Visit {
    /// Chunks that are still there.
    pub kept: Tally,
    /// Chunks removed for the size of the directory.
    pub for_size: Tally,
    /// Chunks removed for the free space of the file system.
    pub for_space: Tally,
    /// Chunks removed because they were not used for too long.
    pub for_age: Tally,
    /// Chunks that have a name and about which the file system said nothing more.
    pub unseen: u64,
}

impl Visit {
    /// Counts a chunk that was removed.
    pub fn add_removed(&mut self, reason: Reason, bytes: u64) {
        match reason {
            Reason::Size => self.for_size.add(bytes),
            Reason::Space => self.for_space.add(bytes),
            Reason::Age => self.for_age.add(bytes),
        }
    }

    /// Adds another visit.
    pub fn add_all(&mut self, other: &Self) {
        self.kept.add_all(other.kept);
        self.for_size.add_all(other.for_size);
        self.for_space.add_all(other.for_space);
        self.for_age.add_all(other.for_age);
        self.unseen += other.unseen;
    }

    /// Returns all that was removed.
    pub fn removed(&self) -> Tally {
        let mut all = self.for_size;
        all.add_all(self.for_space);
        all.add_all(self.for_age);
        all
    }
}

/// What decides about a visit, at its time.
#[derive(Debug, Clone, Copy)]
pub struct Situation {
    /// Milliseconds since 1970 by the clock that stamps are made by.
    pub now_milliseconds: i64,
    /// Bytes that count against the limit.
    pub used_bytes: u64,
    /// The most bytes there may be.
    pub limit_bytes: Option<u64>,
    /// Which limit that is: [`Reason::Size`] or [`Reason::Space`].
    pub reason: Reason,
    /// Bytes that others stored less what others removed, up to now; only differences count.
    pub flow_bytes: i64,
}

/// What a sweeper is told once.
#[derive(Debug, Clone, Copy)]
pub struct SweepRules {
    /// Which chunks go first.
    pub policy: EvictionPolicy,
    /// Share of the limit at which eviction ends; it begins half-way from there to the limit.
    pub low_watermark: f64,
    /// Milliseconds without use after which a chunk goes in any case.
    pub ttl_milliseconds: Option<i64>,
}

impl SweepRules {
    /// Returns the bytes above which eviction begins.
    pub fn high_mark(&self, limit_bytes: u64) -> u64 {
        (limit_bytes as f64 * f64::midpoint(1.0, self.low_watermark)) as u64
    }

    /// Returns the bytes at which eviction ends.
    pub fn low_mark(&self, limit_bytes: u64) -> u64 {
        (limit_bytes as f64 * self.low_watermark) as u64
    }
}

/// How much there is, counted slice by slice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Slices that were counted.
    pub slices: u16,
    /// What they held when they were left.
    pub found: Tally,
    /// Slices that could not be visited.
    pub failed: u16,
    /// Chunks that are missing from this, see [`Visit::unseen`].
    pub unseen: u64,
    flow_first: i64,
    /// Sum of the flow at each slice: what came later is missing from the slice's count.
    flow_sum: i128,
}

impl Count {
    fn add(&mut self, visit: &Visit, flow_bytes: i64) {
        if self.slices == 0 {
            self.flow_first = flow_bytes;
        }
        self.slices += 1;
        self.found.add_all(visit.kept);
        self.unseen += visit.unseen;
        self.flow_sum += i128::from(flow_bytes);
    }

    /// Returns whether no slice is left, and whether the others can stand for those that failed.
    fn is_whole(&self) -> bool {
        self.slices + self.failed == SLICES && self.failed <= FAILED_MAX
    }

    /// Returns the bytes of all slices, when `flow_bytes` is the flow now.
    ///
    /// Slices that were not counted are taken for average ones. What was stored since a slice was
    /// counted is spread over all slices, as keys are.
    pub fn total_bytes(&self, flow_bytes: i64) -> u64 {
        if self.slices == 0 {
            return 0;
        }
        let (slices, all) = (i128::from(self.slices), i128::from(SLICES));
        let later = (i128::from(flow_bytes) * slices - self.flow_sum) / all;
        let counted = i128::from(self.found.bytes) + later;
        u64::try_from((counted * all / slices).max(0)).unwrap_or(u64::MAX)
    }

    /// Returns by how many bytes the total may be off while others store: those of the time of the
    /// count are spread by chance, `sqrt(n)` chunks off, here four times that.
    pub fn error_bytes(&self, flow_bytes: i64) -> u64 {
        let flow = (flow_bytes - self.flow_first).unsigned_abs();
        let chunk = self.found.bytes / self.found.chunks.max(1);
        (4.0 * (flow as f64 * chunk as f64).sqrt()) as u64
    }
}

/// What came of one step.
#[derive(Debug, Default)]
#[must_use]
pub struct Step {
    /// The visit.
    pub visit: Visit,
    /// The count of a pass that ended with this step.
    pub pass: Option<Count>,
    /// What kept a part of the slice from being visited; what was removed of the rest is gone.
    pub error: Option<Error>,
}

#[derive(Debug)]
enum Mode {
    /// There is room.
    Rest,
    /// There is not, and how old chunks are is being found out.
    /// All ages are those by the clock of the start, however long it takes.
    Sample {
        walked: u16,
        ages: AgeSample,
        now: i64,
    },
    /// What has this age by the clock of the sample's start is removed.
    Evict {
        walked: u16,
        removed: u64,
        from_age: i64,
        now: i64,
    },
    /// A whole round removed nothing: what fills the store is none of its chunks.
    Stuck { walked: u16 },
}

/// The state of the visits.
#[derive(Debug)]
pub struct Sweeper {
    rules: SweepRules,
    cursor: u16,
    seed: u64,
    mode: Mode,
    count: Count,
}

impl Sweeper {
    /// Makes a sweeper; `seed` decides where it begins and what it samples.
    pub fn new(rules: SweepRules, seed: u64) -> Self {
        Self {
            rules,
            cursor: (seed % u64::from(SLICES)) as u16,
            seed,
            mode: Mode::Rest,
            count: Count::default(),
        }
    }

    /// Returns whether chunks must go: the next step should not wait.
    pub fn is_evicting(&self) -> bool {
        matches!(self.mode, Mode::Sample { .. } | Mode::Evict { .. })
    }

    /// Returns whether chunks must go and a whole round found none to remove.
    pub fn is_stuck(&self) -> bool {
        matches!(self.mode, Mode::Stuck { .. })
    }

    /// Looks for chunks to remove again after a round that found none.
    pub fn retry(&mut self) {
        if self.is_stuck() {
            self.mode = Mode::Rest;
        }
    }

    /// Returns the count of the pass under way.
    pub fn count(&self) -> Count {
        self.count
    }

    /// Returns whether the next step would begin to evict.
    pub fn begins_now(&self, situation: &Situation) -> bool {
        matches!(self.mode, Mode::Rest) && self.goal(situation) > 0
    }

    /// Begins to count anew: what was counted does not fit what is there.
    pub fn restart_count(&mut self) {
        self.count = Count::default();
    }

    /// Visits the next slice.
    ///
    /// One that fails is passed over; when more than one in 64 do, the count begins anew.
    pub fn step(&mut self, shelf: &mut dyn Shelf, situation: &Situation) -> Step {
        let goal = self.goal(situation);
        self.turn(goal, situation);
        let slice = self.cursor;
        self.cursor = (slice + 1) % SLICES;
        let (rules, now, mode) = (self.rules, situation.now_milliseconds, &mut self.mode);
        let mut left = goal;
        let mut judge = |stamp: Stamp, bytes: u64| {
            let unused = now.saturating_sub(stamp.milliseconds());
            if rules.ttl_milliseconds.is_some_and(|ttl| unused > ttl) {
                left = left.saturating_sub(bytes);
                return Some(Reason::Age);
            }
            match &mut *mode {
                Mode::Sample { ages, now, .. } => ages.add(rules.policy.age(stamp, *now), bytes),
                Mode::Evict { from_age, now, .. }
                    if left > 0 && rules.policy.age(stamp, *now) >= *from_age =>
                {
                    left = left.saturating_sub(bytes);
                    return Some(situation.reason);
                }
                _ => {}
            }
            None
        };
        let mut visit = Visit::default();
        let error = shelf.visit(slice, &mut judge, &mut visit).err();
        self.walked(goal, situation, visit.removed().chunks);
        if error.is_none() {
            self.count.add(&visit, situation.flow_bytes);
        } else {
            self.count.failed += 1;
        }
        if self.count.failed > FAILED_MAX {
            self.restart_count();
        }
        let whole = self.count.is_whole();
        let pass = whole.then(|| std::mem::take(&mut self.count));
        Step { visit, pass, error }
    }

    /// Returns the bytes that must go now; nothing between the marks unless eviction is under way.
    fn goal(&self, situation: &Situation) -> u64 {
        let Some(limit) = situation.limit_bytes else {
            return 0;
        };
        let begins = matches!(self.mode, Mode::Rest);
        if begins && situation.used_bytes <= self.rules.high_mark(limit) {
            return 0;
        }
        situation
            .used_bytes
            .saturating_sub(self.rules.low_mark(limit))
    }

    /// Begins or ends eviction.
    fn turn(&mut self, goal: u64, situation: &Situation) {
        if goal == 0 {
            self.mode = Mode::Rest;
        } else if matches!(self.mode, Mode::Rest) {
            self.sample(situation);
        }
    }

    fn sample(&mut self, situation: &Situation) {
        self.seed = self.seed.wrapping_add(situation.now_milliseconds as u64);
        self.mode = Mode::Sample {
            walked: 0,
            ages: AgeSample::new(self.seed),
            now: situation.now_milliseconds,
        };
    }

    /// Goes on after a visit of one slice.
    fn walked(&mut self, goal: u64, situation: &Situation, chunks_removed: u64) {
        match &mut self.mode {
            Mode::Rest => {}
            Mode::Sample { walked, ages, now } => {
                *walked += 1;
                if ages.seen() < SAMPLE_MAX as u64 && *walked < SLICES {
                    return;
                }
                let share = goal as f64 / situation.used_bytes.max(1) as f64;
                self.mode = match ages.oldest(share) {
                    Some(from_age) => Mode::Evict {
                        walked: 0,
                        removed: 0,
                        from_age,
                        now: *now,
                    },
                    None => Mode::Stuck { walked: 0 },
                };
            }
            Mode::Evict {
                walked, removed, ..
            } => {
                *walked += 1;
                *removed += chunks_removed;
                if *walked == SLICES {
                    if *removed == 0 {
                        self.mode = Mode::Stuck { walked: 0 };
                    } else {
                        self.sample(situation);
                    }
                }
            }
            Mode::Stuck { walked } => {
                *walked += 1;
                if *walked == SLICES {
                    self.mode = Mode::Rest;
                }
            }
        }
    }
}
