//! A store that consists of numbers, evicted by the code that evicts files.

use std::collections::HashMap;

use kvrail::config::{Admission, EvictionPolicy};
use kvrail::store::capacity::{
    Reason, SLICES, SeenChunks, Shelf, Situation, Stamp, SweepRules, Sweeper, Visit,
};

use crate::failure::Failure;
use crate::workload::Request;

/// What one run counted, after its warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) chunks_asked: u64,
    pub(crate) chunks_hit: u64,
    pub(crate) chunks_written: u64,
}

/// Chunks by slice, as folders hold them.
#[derive(Debug)]
struct Numbers {
    slices: Vec<HashMap<u64, Stamp>>,
}

impl Numbers {
    fn slice(&mut self, key: u64) -> Option<&mut HashMap<u64, Stamp>> {
        self.slices.get_mut((key >> 52) as usize)
    }

    fn get(&self, key: u64) -> Option<Stamp> {
        self.slices.get((key >> 52) as usize)?.get(&key).copied()
    }

    fn set(&mut self, key: u64, stamp: Stamp) {
        if let Some(slice) = self.slice(key) {
            slice.insert(key, stamp);
        }
    }
}

impl Shelf for Numbers {
    fn visit(
        &mut self,
        slice: u16,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> kvrail::Result<()> {
        if let Some(chunks) = self.slices.get_mut(usize::from(slice)) {
            chunks.retain(|_, stamp| match judge(*stamp, 1) {
                None => {
                    visit.kept.add(1);
                    true
                }
                Some(reason) => {
                    visit.add_removed(reason, 1);
                    false
                }
            });
        }
        Ok(())
    }
}

/// A store of `limit` chunks.
#[derive(Debug)]
pub(crate) struct Cache {
    shelf: Numbers,
    sweeper: Sweeper,
    rules: SweepRules,
    admission: Admission,
    seen: SeenChunks,
    limit: u64,
    used: u64,
    pub(crate) counts: Counts,
}

impl Cache {
    pub(crate) fn new(policy: EvictionPolicy, admission: Admission, limit: u64) -> Self {
        let rules = SweepRules {
            policy,
            low_watermark: 0.9,
            ttl_milliseconds: None,
        };
        Self {
            shelf: Numbers {
                slices: vec![HashMap::new(); usize::from(SLICES)],
            },
            sweeper: Sweeper::new(rules, 1),
            rules,
            admission,
            seen: SeenChunks::default(),
            limit,
            used: 0,
            counts: Counts::default(),
        }
    }

    /// Serves a request: the longest prefix that is there is a hit, the rest is stored.
    pub(crate) fn serve(&mut self, request: &Request) -> Result<(), Failure> {
        let now = request.at_milliseconds;
        let present = request
            .chunks
            .iter()
            .take_while(|key| self.shelf.get(**key).is_some());
        let hits = present.count();
        self.counts.chunks_asked += request.chunks.len() as u64;
        self.counts.chunks_hit += hits as u64;
        let mut parent = None;
        for key in &request.chunks {
            parent = match self.shelf.get(*key) {
                Some(stamp) => {
                    let renewed = stamp.renewed(now, parent).unwrap_or(stamp);
                    self.shelf.set(*key, renewed);
                    Some(renewed.milliseconds())
                }
                None if self.admits(*key) && self.used < self.limit => {
                    let stamp = Stamp::first(now, parent);
                    self.shelf.set(*key, stamp);
                    self.used += 1;
                    self.counts.chunks_written += 1;
                    Some(stamp.milliseconds())
                }
                None => parent,
            };
        }
        self.evict(now)
    }

    fn admits(&mut self, key: u64) -> bool {
        if self.admission == Admission::All {
            return true;
        }
        let is_short = self.used > self.rules.low_mark(self.limit);
        self.seen.show(&key.to_le_bytes()) || !is_short
    }

    /// Does what a janitor does when there is too much; it takes no time here.
    fn evict(&mut self, now: i64) -> Result<(), Failure> {
        loop {
            let situation = Situation {
                now_milliseconds: now,
                used_bytes: self.used,
                limit_bytes: Some(self.limit),
                reason: Reason::Size,
                flow_bytes: 0,
            };
            if !self.sweeper.is_evicting() && !self.sweeper.begins_now(&situation) {
                return Ok(());
            }
            let step = self.sweeper.step(&mut self.shelf, &situation);
            self.used -= step.visit.removed().chunks;
        }
    }
}
