//! Visits without files: of ten million chunks in little memory, and of slices that fail.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

use kvrail::store::capacity::{
    Reason, SLICES, Shelf, Situation, Stamp, SweepRules, Sweeper, Visit,
};

/// Ten million chunks that exist as numbers only: a slice's are made when it is visited.
struct Numbers {
    removed: std::collections::HashMap<u16, i64>,
    now: i64,
}

const MILLION: i64 = 1_000_000;
const PER_SLICE: i64 = 10 * MILLION / SLICES as i64;

impl Shelf for Numbers {
    fn visit(
        &mut self,
        slice: u16,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> kvrail::Result<()> {
        // Ages lie evenly between 0 and ten million seconds; the oldest of a slice go first.
        let gone = *self.removed.get(&slice).unwrap_or(&0);
        for place in 0..PER_SLICE - gone {
            let age = place * i64::from(SLICES) + i64::from(slice);
            match judge(Stamp::new(self.now - 1000 * age, 0), 1) {
                None => visit.kept.add(1),
                Some(reason) => {
                    visit.add_removed(reason, 1);
                    *self.removed.entry(slice).or_default() += 1;
                }
            }
        }
        Ok(())
    }
}

/// Returns the most memory that this process has used, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

#[test]
fn ten_million_chunks_are_swept_in_little_memory() {
    let before = peak_memory();
    let all = (PER_SLICE * i64::from(SLICES)) as u64;
    let mut shelf = Numbers {
        removed: std::collections::HashMap::new(),
        now: 1_800_000_000_000,
    };
    let rules = SweepRules {
        policy: kvrail::config::EvictionPolicy::Lru,
        low_watermark: 0.9,
        ttl_milliseconds: None,
    };
    let mut sweeper = Sweeper::new(rules, 99);
    let (mut left, mut steps, mut visited) = (all, 0, 0);
    let target = rules.low_mark(all);
    while left > target {
        let situation = Situation {
            now_milliseconds: shelf.now,
            used_bytes: left,
            limit_bytes: Some(all),
            reason: Reason::Size,
            flow_bytes: 0,
        };
        let step = sweeper.step(&mut shelf, &situation);
        assert!(step.error.is_none());
        left -= step.visit.removed().chunks;
        visited += step.visit.kept.chunks + step.visit.removed().chunks;
        steps += 1;
        assert!(steps < 4 * u32::from(SLICES), "no end of it");
    }
    let grown = peak_memory() - before;
    println!(
        "{all} chunks, {} removed in {steps} slices, {visited} looked at, {} KiB more memory at the \
         peak ({} MiB in all)",
        all - left,
        grown >> 10,
        peak_memory() >> 20
    );
    assert!(peak_memory() < 200 << 20);
    assert!(grown < 8 << 20, "{grown} bytes");
    assert!(visited <= 2 * all);
    // What went was old: no slice lost more than 12% where 10% had to go.
    assert!(
        shelf
            .removed
            .values()
            .all(|removed| *removed <= PER_SLICE * 12 / 100)
    );
}

/// Two chunks of a byte in each slice, old and new; some slices fail, their first half at least.
struct Failing {
    slices: u16,
    gone: std::collections::HashSet<u16>,
}

impl Shelf for Failing {
    fn visit(
        &mut self,
        slice: u16,
        judge: &mut dyn FnMut(Stamp, u64) -> Option<Reason>,
        visit: &mut Visit,
    ) -> kvrail::Result<()> {
        if !self.gone.contains(&slice) {
            match judge(Stamp::new(0, 0), 1) {
                None => visit.kept.add(1),
                Some(reason) => {
                    visit.add_removed(reason, 1);
                    self.gone.insert(slice);
                }
            }
        }
        if slice < self.slices {
            return Err(kvrail::Error::new(kvrail::ErrorKind::Io, "broken"));
        }
        visit.kept.add(1);
        Ok(())
    }
}

/// Goes round twice. Returns the counts of the passes that ended, failures, and what was removed.
fn sweep_failing(slices: u16, ttl_milliseconds: Option<i64>) -> (Vec<(u64, u16)>, u32, u64) {
    let rules = SweepRules {
        policy: kvrail::config::EvictionPolicy::Lru,
        low_watermark: 0.9,
        ttl_milliseconds,
    };
    let gone = std::collections::HashSet::new();
    let mut shelf = Failing { slices, gone };
    let mut sweeper = Sweeper::new(rules, 7);
    let (mut passes, mut failures, mut removed) = (Vec::new(), 0, 0);
    for _ in 0..2 * u32::from(SLICES) {
        let situation = Situation {
            now_milliseconds: 1000,
            used_bytes: 2 * u64::from(SLICES),
            limit_bytes: None,
            reason: Reason::Size,
            flow_bytes: 0,
        };
        let step = sweeper.step(&mut shelf, &situation);
        failures += u32::from(step.error.is_some());
        removed += step.visit.removed().chunks;
        passes.extend(step.pass.map(|count| (count.total_bytes(0), count.failed)));
    }
    (passes, failures, removed)
}

#[test]
fn slices_that_fail_stop_no_count_and_what_was_removed_of_them_is_known() {
    let all = 2 * u64::from(SLICES);
    assert_eq!(sweep_failing(0, None), (vec![(all, 0); 2], 0, 0));
    let most = SLICES / 64;
    let found = sweep_failing(most, None);
    assert_eq!(found, (vec![(all, most); 2], 2 * u32::from(most), 0));
    // One in 64 is enough to say nothing.
    let found = sweep_failing(most + 1, None);
    assert_eq!(found, (vec![], 2 * u32::from(most + 1), 0));
    assert_eq!(sweep_failing(SLICES, None).0, vec![]);
    let (_, _, removed) = sweep_failing(most, Some(10));
    assert_eq!(removed, u64::from(SLICES));
}
