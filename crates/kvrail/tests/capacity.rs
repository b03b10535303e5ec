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
use std::time::{Duration, Instant, SystemTime};

use common::{Cache, Geometry, LIMIT, chunk, chunk_files, chunk_path, config, namespace};
use kvrail::config::{Admission, MinFree, StoreConfig};
use kvrail::store::capacity::{
    Janitor, JanitorSettings, JanitorTiming, Reason, SLICES, Shelf, Situation, Stamp, SweepRules,
    Sweeper, Visit, evictions, usage,
};
use kvrail::{KvCache, OpenOptions, Store, StoreChunk};
use rustix::process::{Pid, Signal, kill_process};

const CHILD_DIRECTORY: &str = "KVRAIL_TEST_CAPACITY_DIRECTORY";
const CHILD_NUMBER: &str = "KVRAIL_TEST_CAPACITY_NUMBER";
/// Head, three pages of payload, one of table.
const FILE_BYTES: u64 = 20_480;
const LIMIT_BYTES: u64 = 400 * FILE_BYTES;

fn limited(path: &Path, max_size: u64) -> StoreConfig {
    StoreConfig {
        max_size: Some(max_size),
        ..config(path)
    }
}

fn open(config: &StoreConfig) -> Store {
    Store::open(config, namespace(), OpenOptions::default()).unwrap()
}

fn bytes(path: &Path) -> u64 {
    if !namespace_directory(path).is_dir() {
        return 0;
    }
    chunk_files(path)
        .iter()
        .filter_map(|file| std::fs::metadata(file).ok())
        .map(|metadata| metadata.len())
        .sum()
}

fn namespace_directory(path: &Path) -> PathBuf {
    path.join(namespace().directory_name())
}

/// Waits for a condition that other threads bring about.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn store_one(cache: &KvCache, index: u64) -> kvrail::StoreReport {
    let chunk = StoreChunk {
        chunk: kvrail::ChunkRef {
            parent: None,
            ..chunk(index)
        },
        blocks: vec![0, 1],
    };
    cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap()
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
    let store = open(&limited(Path::new(&directory), LIMIT_BYTES));
    let cache = Cache::attach(&store, 0, Geometry::default());
    let first = number.parse::<u64>().unwrap() << 32;
    for index in first.. {
        if ENDED.load(Ordering::Relaxed) {
            break;
        }
        if store_one(&cache.kv_cache, index).dropped > 0 {
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
        let found = bytes(path);
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
    let found = bytes(path);
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
            (round == 0 && bytes(path) > LIMIT_BYTES / 2)
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
        let found = bytes(path);
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
fn a_prefix_loses_its_tail_before_its_head() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(&config(path));
    let cache = Cache::attach(&store, 0, Geometry::default());
    // One prompt of 40 chunks, stored in two calls; then its second half is loaded alone, as when
    // the serving engine has the first half in its own memory.
    let chunks = |range: std::ops::Range<u64>| -> Vec<_> {
        range.map(|index| (index, vec![0, 1])).collect()
    };
    cache.store(&chunks(0..20));
    cache.store(&chunks(20..40));
    let stamp = |index: u64| {
        let metadata = std::fs::metadata(chunk_path(path, 0, index)).unwrap();
        let since = metadata
            .modified()
            .unwrap()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        Stamp::from_time(since.as_secs() as i64, i64::from(since.subsec_nanos()))
    };
    let is_ordered =
        || (0..39).all(|index| stamp(index).milliseconds() > stamp(index + 1).milliseconds());
    // Whatever order the threads worked in.
    assert!(is_ordered());
    store.close(LIMIT).unwrap();
    // Long ago, in the wrong order.
    for index in 0..40 {
        let file = std::fs::File::options()
            .write(true)
            .open(chunk_path(path, 0, index))
            .unwrap();
        let age = Duration::from_secs(4000 - index);
        file.set_modified(SystemTime::now() - age).unwrap();
    }
    // One thread, so that chunks are loaded in order.
    let store = open(&StoreConfig {
        disk_io_threads: 1,
        ..config(path)
    });
    let cache = Cache::attach(&store, 0, Geometry::default());
    let load = |range: std::ops::Range<u64>| {
        let chunks: Vec<_> = range.map(|index| (index, 0, vec![0, 1])).collect();
        let report = cache.load(&chunks);
        assert_eq!(report.failed, Vec::<usize>::new(), "{report:?}");
    };
    load(0..40);
    assert!(is_ordered());
    assert_eq!(store.metrics().chunks_touched, 40);
    assert!((0..40).all(|index| stamp(index).uses() == 1));
    let touched: Vec<Stamp> = (0..40).map(stamp).collect();
    load(20..40);
    assert_eq!(
        store.metrics().chunks_touched,
        40,
        "once in a minute is enough"
    );
    assert!((0..40).all(|index| stamp(index) == touched[index as usize]));
    store.close(LIMIT).unwrap();
    drop(cache);
    drop(store);

    let settings = JanitorSettings {
        max_size: Some(20 * FILE_BYTES),
        min_free: MinFree::Bytes(0),
        ..JanitorSettings::new(&config(path))
    };
    let mut janitor = Janitor::open(path, settings).unwrap();
    wait_until("eviction", || {
        let tick = janitor.tick().unwrap();
        chunk_files(path).len() < 40 && !tick.busy
    });
    assert_eq!(chunk_files(path).len(), 18);
    assert!((0..18).all(|index| chunk_path(path, 0, index).exists()));
}

#[test]
fn using_a_tail_renews_the_head_that_the_engine_had_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(&StoreConfig {
        disk_io_threads: 1,
        ..config(path)
    });
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..10).for_each(|index| {
        cache.store(&[(index, vec![0, 1])]);
    });
    let modified = |index: u64| {
        std::fs::metadata(chunk_path(path, 0, index))
            .unwrap()
            .modified()
            .unwrap()
    };
    // Another host touched nothing for an hour; this process remembers what it stored just now, so
    // nothing is renewed: a file's own time does not matter to it for a minute.
    let before: Vec<_> = (0..10).map(modified).collect();
    cache.store(&[(10, vec![0, 1])]);
    assert!((0..10).all(|index| modified(index) == before[index as usize]));
    assert!(modified(10) < modified(9));
    // A process that knows nothing yet: a new chunk is older than the one before it, as the file says.
    let old = SystemTime::now() - Duration::from_secs(3000);
    let file = std::fs::File::options()
        .write(true)
        .open(chunk_path(path, 0, 10))
        .unwrap();
    file.set_modified(old).unwrap();
    drop(store);
    let store = open(&config(path));
    let cache = Cache::attach(&store, 0, Geometry::default());
    cache.store(&[(11, vec![0, 1])]);
    assert!(modified(11) < old);
}

#[test]
fn a_load_that_holds_a_file_open_gets_its_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = open(&config(path));
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
    let store = open(&settings);
    let cache = Cache::attach(&store, 0, Geometry::default());
    // With plenty of room everything is stored.
    for index in 0..361 {
        wait_until("a store", || store_one(&cache.kv_cache, index).dropped == 0);
    }
    wait_until("the usage", || {
        store.metrics().usage_bytes > LIMIT_BYTES * 9 / 10
    });
    let refused = store_one(&cache.kv_cache, 1000);
    assert_eq!((refused.stored, refused.dropped), (0, 1));
    assert_eq!(store.metrics().stores_dropped_not_admitted, 1);
    assert_eq!(store_one(&cache.kv_cache, 1000).stored, 1);
    store.close(LIMIT).unwrap();
}

#[test]
fn opening_takes_no_longer_with_many_chunks() {
    let open_seconds = |chunks: u64| {
        let directory = tempfile::tempdir().unwrap();
        drop(open(&limited(directory.path(), u64::MAX / 2)));
        for index in 0..chunks {
            let path = chunk_path(directory.path(), 0, index);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let times = (0..5).map(|_| {
            let start = Instant::now();
            let store = open(&limited(directory.path(), u64::MAX / 2));
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

/// A small file system of its own; `None` where it cannot be mounted.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn mount(mib: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(folder)),
            other => {
                eprintln!("skipped: a small file system needs the right to mount: {other:?}");
                None
            }
        }
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let done = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
        assert!(done.unwrap().success());
    }
}

#[test]
fn chunks_make_way_for_what_others_put_on_the_file_system() {
    let Some(small) = SmallFileSystem::mount(40) else {
        return;
    };
    let path = small.0.path().join("kv");
    let settings = StoreConfig {
        min_free: MinFree::Share(0.25),
        ..config(&path)
    };
    let store = open(&settings);
    let cache = Cache::attach(&store, 0, Geometry::default());
    let free = || {
        let found = rustix::fs::statvfs(small.0.path()).unwrap();
        found.f_bavail * found.f_frsize
    };
    let reserve = 10 << 20;
    // Twice as much as fits.
    let mut lowest = u64::MAX;
    for index in 0..3000 {
        store_one(&cache.kv_cache, index);
        lowest = lowest.min(free());
    }
    let metrics = store.metrics();
    println!("{metrics:?}, at least {lowest} bytes were free");
    assert!(metrics.chunks_stored > 1400, "{}", metrics.chunks_stored);
    // A measured free space holds for a second, in which little of this size is stored.
    assert!(lowest >= reserve - (4 << 20), "{lowest}");
    wait_until("eviction for space", || {
        store.metrics().chunks_evicted_space > 0 && free() > reserve
    });
    // Somebody else takes 16 MiB, more than is free at any moment, each piece as soon as it fits.
    let mut theirs = std::fs::File::create(small.0.path().join("theirs")).unwrap();
    for _ in 0..16 {
        wait_until("room for a piece", || free() > 2 << 20);
        theirs.write_all(&vec![1; 1 << 20]).unwrap();
    }
    wait_until("room for the others", || free() > reserve);
    wait_until("stores", || {
        store_one(&cache.kv_cache, 100_000).stored == 1 || chunk_path(&path, 0, 100_000).exists()
    });
    store.close(LIMIT).unwrap();
    let found = bytes(&path);
    assert!(usage(&path).unwrap().bytes.unwrap().abs_diff(found) <= found / 100);
}
