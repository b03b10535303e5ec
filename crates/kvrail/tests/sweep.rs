//! Visits of ten million chunks, in a process of its own since its memory is measured.
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
    ) -> kvrail::Result<Visit> {
        let mut visit = Visit::default();
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
        Ok(visit)
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
        let step = sweeper.step(&mut shelf, &situation).unwrap();
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
