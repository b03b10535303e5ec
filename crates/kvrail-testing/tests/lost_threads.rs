//! A path that hangs again and again until no thread is left: nothing waits for one, and the store
//! works again when the threads come back.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::thread;
use std::time::{Duration, Instant};

use common::mount;
use kvrail::{OpenOptions, Store};
use kvrail_testing::{FaultMount, fresh_seed};
use store::{Cache, Geometry, LIMIT, config, key, namespace};

/// One thread, and the four that may take its place.
const THREADS: u64 = 5;
const WAIT_LIMIT: f64 = 0.4;
/// What ends at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(300);
/// Chunks that are never stored: the kernel asks for their names each time.
const MISSING: u64 = 1000;

struct Subject {
    store: Store,
    cache: Cache,
}

impl Subject {
    fn new(mounted: &FaultMount) -> Self {
        let mut config = config(mounted.path());
        config.disk_io_threads = 1;
        config.wait_limit_seconds = WAIT_LIMIT;
        config.lookup_limit_seconds = WAIT_LIMIT;
        config.slow_limit_seconds = 30.0;
        let store = Store::open(&config, namespace(), OpenOptions::default()).unwrap();
        let cache = Cache::attach(&store, 0, Geometry::default());
        let subject = Self { store, cache };
        assert_eq!(subject.cache.store(&[(0, vec![0, 1])]).stored, 1);
        subject
    }

    fn loads(&self, index: u64) -> bool {
        self.cache.load(&[(index, 0, vec![2, 3])]).loaded == 1
    }

    fn finds(&self, index: u64) -> bool {
        let ticket = self.store.lookup(0, &[0], vec![key(index)]);
        ticket.wait(LIMIT).unwrap() == 1
    }
}

/// Returns the rule that makes asking for a chunk hang: its folder is not there either.
fn hang(index: u64) -> String {
    format!("lookup */g0r0/{}* hang\n", &key(index).to_string()[..3])
}

/// Makes the work on other chunks hang until no thread is left for more of `work`, then heals.
fn exhaust(work: impl Fn(&Subject, u64) -> bool, other: impl Fn(&Subject, u64) -> bool) {
    let Some(mounted) = mount(fresh_seed()) else {
        return;
    };
    let subject = Subject::new(&mounted);
    let until = |what: &str, is_true: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is_true() {
            assert!(start.elapsed() < LIMIT, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let mut rules = String::new();
    for number in 0..THREADS {
        rules += &hang(MISSING + number);
        mounted.set(&rules);
        let start = Instant::now();
        assert!(!work(&subject, MISSING + number));
        let limit = Duration::from_secs_f64(WAIT_LIMIT);
        assert!(start.elapsed() >= limit, "it did not hang");
        // The path is well for all but these names, so it is taken back into use.
        until("the path stayed out", &|| other(&subject, 0));
    }
    let start = Instant::now();
    assert!(!work(&subject, 0));
    println!("without threads: ended after {:?}", start.elapsed());
    assert!(start.elapsed() < AT_ONCE);
    mounted.heal();
    until("no thread came back", &|| work(&subject, 0));
    // And they are as many as before, so that one may hang again.
    mounted.set(&hang(MISSING + 2 * THREADS));
    assert!(!work(&subject, MISSING + 2 * THREADS));
    until("it was not replaced", &|| work(&subject, 0));
}

#[test]
fn loads_end_when_no_thread_is_left_and_come_back_with_the_threads() {
    exhaust(Subject::loads, Subject::finds);
}

#[test]
fn lookups_end_when_no_thread_is_left_and_come_back_with_the_threads() {
    exhaust(Subject::finds, Subject::loads);
}
