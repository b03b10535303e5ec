//! Capacity as stores keep it together: real processes, real chunks, real time.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{
    Cache, FILE_BYTES, Geometry, LIMIT, chunk, chunk_bytes, chunk_path, limited, namespace, open,
    open_as, wait_until,
};
use kvrail::StoreChunk;
use kvrail::config::{Admission, MinFree, StoreConfig};
use kvrail::store::capacity::{Janitor, JanitorSettings, JanitorTiming, evictions, usage};
use rustix::process::{Pid, Signal, kill_process};

const CHILD_DIRECTORY: &str = "KVRAIL_TEST_CAPACITY_DIRECTORY";
const CHILD_NUMBER: &str = "KVRAIL_TEST_CAPACITY_NUMBER";
const LIMIT_BYTES: u64 = 400 * FILE_BYTES;

fn namespace_directory(path: &Path) -> PathBuf {
    path.join(namespace().directory_name())
}

/// Not a test of its own: stores chunks of its own until its input ends.
#[test]
#[ignore = "runs as the child of the tests with several processes"]
fn child() {
    let (Ok(directory), Ok(number)) = (std::env::var(CHILD_DIRECTORY), std::env::var(CHILD_NUMBER))
    else {
        eprintln!("skipped: only meant to be started by the tests with several processes");
        return;
    };
    static ENDED: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        drop(std::io::stdin().read(&mut [0]));
        ENDED.store(true, Ordering::Relaxed);
    });
    let store = open_as(&limited(Path::new(&directory), LIMIT_BYTES));
    let cache = Cache::attach(&store, 0, Geometry::default());
    let first = number.parse::<u64>().unwrap() << 32;
    for index in first.. {
        if ENDED.load(Ordering::Relaxed) {
            break;
        }
        if cache.store_alone(index).dropped > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    store.close(LIMIT).unwrap();
}

fn start(directory: &Path, number: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(CHILD_DIRECTORY, directory)
        .env(CHILD_NUMBER, number.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn signal(children: &[Child], signal: Signal) {
    for child in children {
        kill_process(Pid::from_child(child), signal).unwrap();
    }
}

/// Ends a child as its user would.
fn end(mut child: Child) {
    child.stdin.take().unwrap().write_all(b"x").unwrap();
    assert!(child.wait().unwrap().success());
}

/// Counts everything with a janitor that does not wait between slices.
fn count(path: &Path, max_size: u64) -> (u64, u64) {
    let before = usage(path).unwrap().bytes.unwrap();
    let settings = JanitorSettings {
        max_size: Some(max_size),
        min_free: MinFree::Bytes(0),
        timing: JanitorTiming {
            pass: Duration::from_millis(1),
            ..JanitorTiming::default()
        },
        ..JanitorSettings::new(&StoreConfig::with_path("/"))
    };
    let mut janitor = Janitor::open(path, settings).unwrap();
    let mut passes = 0;
    wait_until("two passes", || {
        passes += janitor.tick().unwrap().passes;
        passes >= 2
    });
    janitor.close();
    (before, usage(path).unwrap().bytes.unwrap())
}

#[test]
fn several_processes_stay_below_the_limit_together_and_know_how_much_there_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let children: Vec<Child> = (0..4).map(|number| start(path, number)).collect();
    let log = namespace_directory(path);
    let (mut looks, mut highest, mut janitors) = (0, 0, std::collections::HashSet::new());
    wait_until("240 evictions", || {
        // All stand still while they are counted, wherever they are in their work.
        signal(&children, Signal::STOP);
        let found = chunk_bytes(path);
        signal(&children, Signal::CONT);
        assert!(
            found <= LIMIT_BYTES,
            "{found} bytes, the limit is {LIMIT_BYTES}"
        );
        highest = highest.max(found);
        looks += 1;
        if let Ok(entries) = std::fs::read_dir(path.join(".kvrail")) {
            let names = entries.flatten().map(|entry| entry.file_name());
            janitors.extend(names.filter(|name| name.to_string_lossy().starts_with("janitor.")));
        }
        evictions(&log).count() >= 240
    });
    children.into_iter().for_each(end);
    let found = chunk_bytes(path);
    let said = usage(path).unwrap();
    println!(
        "{looks} looks, at most {highest} of {LIMIT_BYTES} bytes; {} evicted; at the end {found} \
         bytes are there, {said:?}",
        evictions(&log).count()
    );
    assert!(
        highest > LIMIT_BYTES * 9 / 10,
        "the limit was never near: {highest}"
    );
    assert_eq!(janitors.len(), 1, "the lease changed hands: {janitors:?}");
    assert_eq!(said.stores, 0, "an account was left open");
    assert!(said.bytes.unwrap().abs_diff(found) <= found / 100);
    assert_eq!(said.claimed_ahead_bytes, 0);
}

#[test]
fn usage_is_right_to_one_percent_after_crashes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut worst = 0.0_f64;
    for round in 0..5_u64 {
        let mut children: Vec<Child> = (0..3)
            .map(|number| start(path, 3 * round + number))
            .collect();
        let before = evictions(&namespace_directory(path)).count();
        wait_until("stores", || {
            let now = evictions(&namespace_directory(path)).count();
            (round == 0 && chunk_bytes(path) > LIMIT_BYTES / 2)
                || now > before + 50 * (1 + round as usize % 3)
        });
        let last = children.pop().unwrap();
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if round % 2 == 0 {
            end(last);
        } else {
            let mut last = last;
            last.kill().unwrap();
            last.wait().unwrap();
        }
        let found = chunk_bytes(path);
        assert!(found <= LIMIT_BYTES, "round {round}: {found}");
        // With room for all, so that counting is all that the janitor does.
        let (before, after) = count(path, u64::MAX / 2);
        let off = |said: u64| said.abs_diff(found) as f64 / found as f64;
        println!(
            "round {round}: {found} bytes, {:.2}% off before a pass, {:.2}% after",
            100.0 * off(before),
            100.0 * off(after)
        );
        worst = worst.max(off(before));
        assert!(off(after) <= 0.01, "round {round}: {after} for {found}");
    }
    println!("before a pass at most {:.2}% off", 100.0 * worst);
}

#[test]
fn a_load_that_holds_a_file_open_gets_its_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(path);
    let cache = Cache::attach(&store, 0, Geometry::default());
    let stop = AtomicBool::new(false);
    let wrong = std::thread::scope(|scope| {
        // Removes the chunk whenever it is there, as a janitor does.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(std::fs::remove_file(chunk_path(path, 0, 0)));
                std::thread::yield_now();
            }
        });
        let (mut loaded, mut missing) = (0, 0);
        let start = Instant::now();
        while (loaded < 30 || missing < 30) && start.elapsed() < LIMIT {
            cache.fill(2, 7);
            cache.fill(3, 8);
            let stored = StoreChunk {
                chunk: chunk(0),
                blocks: vec![2, 3],
            };
            let ticket = cache.kv_cache.store(&[stored]).unwrap();
            ticket.wait(LIMIT).unwrap();
            let report = cache.load(&[(0, 0, vec![4, 5])]);
            if report.loaded == 1 {
                loaded += 1;
                assert_eq!(cache.block(4), cache.block(2));
                assert_eq!(cache.block(5), cache.block(3));
            } else {
                missing += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        println!("{loaded} loads got their bytes, {missing} were misses");
        assert!(
            loaded >= 30 && missing >= 30,
            "{loaded} loaded, {missing} missing"
        );
        store.metrics().chunks_damaged
    });
    assert_eq!(wrong, 0);
}

#[test]
fn second_use_admission_stores_what_comes_again_once_room_is_short() {
    let directory = tempfile::tempdir().unwrap();
    let settings = StoreConfig {
        admission: Admission::SecondUse,
        ..limited(directory.path(), LIMIT_BYTES)
    };
    let store = open_as(&settings);
    let cache = Cache::attach(&store, 0, Geometry::default());
    // With plenty of room everything is stored.
    for index in 0..361 {
        wait_until("a store", || cache.store_alone(index).dropped == 0);
    }
    wait_until("the usage", || {
        store.metrics().usage_bytes > LIMIT_BYTES * 9 / 10
    });
    let refused = cache.store_alone(1000);
    assert_eq!((refused.stored, refused.dropped), (0, 1));
    assert_eq!(store.metrics().stores_dropped_not_admitted, 1);
    assert_eq!(cache.store_alone(1000).stored, 1);
    store.close(LIMIT).unwrap();
}

#[test]
fn opening_takes_no_longer_with_many_chunks() {
    let open_seconds = |chunks: u64| {
        let directory = tempfile::tempdir().unwrap();
        drop(open_as(&limited(directory.path(), u64::MAX / 2)));
        for index in 0..chunks {
            let path = chunk_path(directory.path(), 0, index);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let times = (0..5).map(|_| {
            let start = Instant::now();
            let store = open_as(&limited(directory.path(), u64::MAX / 2));
            let taken = start.elapsed().as_secs_f64();
            store.close(LIMIT).unwrap();
            taken
        });
        times.fold(f64::INFINITY, f64::min)
    };
    let (few, many) = (open_seconds(10), open_seconds(30_000));
    println!("opened in {few:.4} s with 10 chunks, in {many:.4} s with 30,000");
    assert!(
        many < 5.0 * few + 0.02,
        "{few} s with 10 chunks, {many} s with 30,000"
    );
}

#[test]
fn a_directory_can_be_removed_as_soon_as_its_store_is_dropped() {
    for _ in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let store = open_as(&limited(directory.path(), LIMIT_BYTES));
        assert_eq!(
            Cache::attach(&store, 0, Geometry::default())
                .store_alone(1)
                .stored,
            1
        );
        drop(store);
        directory.close().unwrap();
    }
}
