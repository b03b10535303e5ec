//! A store with chunks that the tests of a faulty mount work on, and the limits that they have.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use kvrail::config::StoreConfig;
use kvrail::{OpenOptions, Store};

use super::store::{Cache, Geometry, LIMIT, config, key, namespace};

/// The limits of these tests, in seconds.
pub const WAIT_LIMIT: f64 = 1.0;
pub const LOOKUP_LIMIT: f64 = 0.5;
pub const SLOW_LIMIT: f64 = 0.4;
/// What is added to a limit before the caller hears of it: the watch looks ten times a second, and
/// these machines are busy.
pub const SLACK: Duration = Duration::from_millis(900);
/// Chunks that every test has on the mount before anything fails.
pub const CHUNKS: u64 = 6;

pub fn limits(path: &Path) -> StoreConfig {
    let mut config = config(path);
    config.wait_limit_seconds = WAIT_LIMIT;
    config.lookup_limit_seconds = LOOKUP_LIMIT;
    config.slow_limit_seconds = SLOW_LIMIT;
    config
}

/// A store with some chunks on a mount.
pub struct Subject {
    pub store: Store,
    pub cache: Cache,
    /// Longest load, store and lookup so far.
    pub longest: [Duration; 3],
}

impl Subject {
    pub fn new(path: &Path) -> Self {
        Self::with_limits(&limits(path))
    }

    pub fn with_limits(config: &StoreConfig) -> Self {
        let store = Store::open(config, namespace(), OpenOptions::default()).unwrap();
        let cache = Cache::attach(&store, 0, Geometry::default());
        let mut subject = Self {
            store,
            cache,
            longest: [Duration::ZERO; 3],
        };
        for index in 0..CHUNKS {
            subject.store_chunk(index);
        }
        assert_eq!(subject.lookup(), CHUNKS as usize);
        subject
    }

    /// Stores a chunk of known content. Returns whether it is there now.
    pub fn store_chunk(&mut self, index: u64) -> bool {
        self.cache.fill(0, 2 * index);
        self.cache.fill(1, 2 * index + 1);
        let start = Instant::now();
        let report = self.cache.store(&[(index, vec![0, 1])]);
        self.longest[1] = self.longest[1].max(start.elapsed());
        report.stored + report.already_present == 1
    }

    /// Loads a chunk and checks its bytes. Returns whether it came.
    pub fn load_chunk(&mut self, index: u64) -> bool {
        self.cache.fill(10, u64::MAX);
        self.cache.fill(11, u64::MAX);
        let start = Instant::now();
        let report = self.cache.load(&[(index, 0, vec![10, 11])]);
        self.longest[0] = self.longest[0].max(start.elapsed());
        if report.loaded == 1 {
            self.cache.fill(20, 2 * index);
            self.cache.fill(21, 2 * index + 1);
            assert_eq!(self.cache.block(10), self.cache.block(20), "chunk {index}");
            assert_eq!(self.cache.block(11), self.cache.block(21), "chunk {index}");
        }
        report.loaded == 1
    }

    pub fn lookup(&mut self) -> usize {
        let keys = (0..CHUNKS).map(key).collect();
        let start = Instant::now();
        let found = self.store.lookup(0, &[0], keys).wait(LIMIT).unwrap();
        self.longest[2] = self.longest[2].max(start.elapsed());
        found
    }

    /// Asserts that nothing took longer than its limit, and prints what it took.
    pub fn assert_bounded(&self, what: &str) {
        let limits = [WAIT_LIMIT, 2.0 * WAIT_LIMIT, LOOKUP_LIMIT];
        let names = ["load", "store", "lookup"];
        for ((name, took), limit) in names.iter().zip(self.longest).zip(limits) {
            let limit = Duration::from_secs_f64(limit);
            println!("{what}: longest {name} {took:.2?}, limit {limit:?}");
            assert!(took <= limit + SLACK, "{what}: {name} took {took:?}");
        }
    }

    /// Waits until the path is in use again and everything works. Returns how long that took.
    pub fn wait_until_well(&mut self) -> Duration {
        let start = Instant::now();
        let mut index = 1000;
        loop {
            index += 1;
            let works = self.lookup() == CHUNKS as usize
                && self.load_chunk(1)
                && self.store_chunk(index)
                && self.load_chunk(index);
            if works {
                return start.elapsed();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it stayed out");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
