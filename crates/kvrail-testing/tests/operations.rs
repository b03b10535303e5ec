//! What a chunk costs a shared file system in operations, which docs/scaling.md computes with.
//!
//! `cargo nextest run -p kvrail-testing --test operations --no-capture` prints the figures.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::time::Duration;

use common::mount;
use kvrail_testing::FaultMount;
use store::{Cache, Geometry, LIMIT, key, limited, open, open_as, wait_until};

/// Repetitions of which each count is the mean.
const TIMES: u64 = 10;
/// What is counted: a name, and the operations and paths that it stands for.
const KINDS: [(&str, &str); 13] = [
    ("lookup of a chunk or temp file", "lookup *.safetensors"),
    ("lookup of a temp file", "lookup *.chunk.*"),
    ("lookup, all", "lookup *"),
    ("getattr", "getattr *"),
    ("setattr", "setattr *"),
    ("open", "open *"),
    ("create", "create *"),
    ("read", "read *"),
    ("write", "write *"),
    ("rename", "rename *"),
    ("unlink", "unlink *"),
    ("readdir", "readdir *"),
    ("statfs", "statfs *"),
];

/// How often each kind of operation happens while `work` runs.
#[derive(Debug)]
struct Counts(Vec<(&'static str, f64)>);

impl Counts {
    /// Counts each kind in a run of its own, as a rule that is hit says no more than that.
    fn of(mounted: &FaultMount, mut work: impl FnMut(u64)) -> Self {
        let mut counts = Vec::new();
        for (run, (name, operations)) in KINDS.into_iter().enumerate() {
            mounted.set(&format!("{operations} delay=0ms"));
            let before = mounted.hits();
            let first = run as u64 * TIMES;
            (first..first + TIMES).for_each(&mut work);
            counts.push((name, (mounted.hits() - before) as f64 / TIMES as f64));
        }
        mounted.heal();
        Self(counts)
    }

    fn get(&self, name: &str) -> f64 {
        self.0.iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Operations that a network file system asks its server for: it believes for seconds what
    /// folders' names mean, so only names of files count among lookups.
    fn remote(&self) -> f64 {
        let others = self
            .0
            .iter()
            .filter(|(name, _)| !name.starts_with("lookup"));
        let names = ["lookup of a chunk or temp file", "lookup of a temp file"];
        let names: f64 = names.iter().map(|name| self.get(name)).sum();
        names + others.map(|(_, count)| count).sum::<f64>()
    }

    fn print(&self, what: &str) {
        let told = self.0.iter().filter(|(_, count)| *count > 0.0);
        let told: Vec<String> = told
            .map(|(name, count)| format!("{name} {count:.2}"))
            .collect();
        println!("{what}: {:.2} ({})", self.remote(), told.join(", "));
    }
}

#[test]
fn a_chunk_costs_a_few_operations() {
    let Some(mounted) = mount(61) else {
        return;
    };
    let store = open(mounted.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store_alone(1_000_000).stored, 1);
    let counts = Counts::of(&mounted, |index| {
        assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1);
    });
    counts.print("store of a new chunk");
    assert!(counts.remote() <= 16.0, "{counts:?}");
    assert_eq!(counts.get("create"), 1.0);
    assert_eq!(counts.get("rename"), 1.0);

    let counts = Counts::of(&mounted, |index| {
        let report = cache.load(&[(index, 0, vec![2, 3])]);
        assert_eq!(report.loaded, 1, "{report:?}");
    });
    counts.print("load of a chunk");
    assert!(counts.remote() <= 8.0, "{counts:?}");
    assert_eq!(counts.get("read"), 1.0, "of one request");

    let at_once = 10;
    let counts = Counts::of(&mounted, |index| {
        let keys = (index / at_once * at_once..).take(10).map(key).collect();
        assert_eq!(store.lookup(0, &[0], keys).wait(LIMIT).unwrap(), 10);
    });
    counts.print("lookup of ten chunks");
    assert!(counts.remote() <= 12.0, "{counts:?}");
    let counts = Counts::of(&mounted, |index| {
        let keys = vec![key(2_000_000 + index)];
        assert_eq!(store.lookup(0, &[0], keys).wait(LIMIT).unwrap(), 0);
    });
    counts.print("lookup of a chunk that is missing");
    assert!(counts.remote() <= 3.0, "{counts:?}");
    store.close(LIMIT).unwrap();
}

#[test]
fn a_store_with_nothing_to_do_costs_little() {
    let Some(mounted) = mount(62) else {
        return;
    };
    let janitor = open_as(&limited(mounted.source(), 1 << 30));
    wait_until("a janitor", || janitor.metrics().janitor_paths == 1);
    let store = open_as(&limited(mounted.path(), 1 << 30));
    std::thread::sleep(Duration::from_secs(1));
    let seconds = Duration::from_secs(1);
    let counts = Counts::of(&mounted, |_| std::thread::sleep(seconds / TIMES as u32 * 3));
    counts.print("a store that watches, for 0.3 s");
    assert!(counts.remote() <= 12.0, "{counts:?}");
    store.close(LIMIT).unwrap();
    janitor.close(LIMIT).unwrap();
}
