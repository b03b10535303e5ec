//! `kill -9` right after each single change that a janitor or `kvrail gc` makes on disk, then going on.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Cache, FILE_BYTES, Geometry, LIMIT, chunk_files, chunk_path, key, names, open};
use kvrail::config::{MinFree, StoreConfig};
use kvrail::io::Observer;
use kvrail::store::capacity::{
    CollectOptions, Janitor, JanitorSettings, JanitorTiming, collect, usage,
};

/// Directory, number of the change to die at, and who dies.
const CHILD: [&str; 3] = [
    "KVRAIL_TEST_EVICTION_DIRECTORY",
    "KVRAIL_TEST_EVICTION_STEP",
    "KVRAIL_TEST_EVICTION_WHO",
];
const CHUNKS: u64 = 24;
/// Chunks that there is room for.
const ROOM: u64 = 10;
/// More changes than there are.
const STEPS_MAX: u64 = 400;

fn settings(observer: Option<Observer>) -> JanitorSettings {
    JanitorSettings {
        max_size: Some(ROOM * FILE_BYTES),
        min_free: MinFree::Bytes(0),
        timing: JanitorTiming {
            tick: Duration::from_millis(20),
            lease_limit: Duration::from_secs(30),
            pass: Duration::from_millis(1),
        },
        observer,
        ..JanitorSettings::new(&StoreConfig::with_path("/"))
    }
}

/// Has a janitor do all there is to do, for some passes.
fn sweep(janitor: &mut Janitor, passes: u64) {
    let start = Instant::now();
    let mut seen = 0;
    loop {
        let tick = janitor.tick().unwrap();
        seen += tick.passes;
        if seen >= passes && !tick.busy {
            return;
        }
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}");
    }
}

fn gc(observer: Option<Observer>) -> CollectOptions {
    CollectOptions {
        to_bytes: Some(ROOM * FILE_BYTES),
        observer,
        ..CollectOptions::default()
    }
}

/// Not a test of its own: the process that dies.
#[test]
#[ignore = "runs as the child of the tests that kill it"]
fn child() {
    let [Ok(directory), Ok(step), Ok(who)] = CHILD.map(std::env::var) else {
        eprintln!("skipped: only meant to be started by the tests that kill it");
        return;
    };
    let last: u64 = step.parse().unwrap();
    let seen = AtomicU64::new(0);
    let observer = Observer::new(move |_| {
        if seen.fetch_add(1, Ordering::SeqCst) == last {
            // Nothing of this process runs after it: no destructor, no other thread.
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        }
    });
    let directory = Path::new(&directory);
    if who == "gc" {
        collect(directory, &gc(Some(observer))).unwrap();
    } else {
        let mut janitor = Janitor::open(directory, settings(Some(observer))).unwrap();
        sweep(&mut janitor, 1);
        janitor.close();
    }
}

/// A store that holds more than there is room for, and the records of two stores that are closed.
fn fill(directory: &Path) {
    let store = open(directory);
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in 0..CHUNKS {
        cache.fill(0, 2 * index);
        cache.fill(1, 2 * index + 1);
        assert_eq!(cache.store(&[(index, vec![0, 1])]).stored, 1);
    }
    store.close(LIMIT).unwrap();
    Janitor::open(directory, settings(None)).unwrap().close();
}

/// Whatever is there is found and right, what is not there is not found, and all can be stored.
fn check_chunks(directory: &Path, what: &str) {
    let store = open(directory);
    let cache = Cache::attach(&store, 0, Geometry::default());
    for index in 0..CHUNKS {
        let is_there = usize::from(chunk_path(directory, 0, index).exists());
        let found = store.lookup(0, &[0], vec![key(index)]).wait(LIMIT).unwrap();
        let loaded = cache.load(&[(index, 0, vec![4, 5])]).loaded;
        assert_eq!((found, loaded), (is_there, is_there), "{what}: {index}");
        cache.fill(0, 2 * index);
        cache.fill(1, 2 * index + 1);
        if loaded == 1 {
            assert_eq!(cache.block(4), cache.block(0), "{what}: {index}");
            assert_eq!(cache.block(5), cache.block(1), "{what}: {index}");
        } else {
            let stored = cache.store(&[(index, vec![0, 1])]).stored;
            assert_eq!(stored, 1, "{what}: {index}");
        }
    }
    store.close(LIMIT).unwrap();
}

/// Returns the names in a folder of the account, lease and log.
fn state(directory: &Path, below: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory.join(".kvrail").join(below)).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// Kills `who` after each change in turn. Returns how many there are, and the chunks left by each.
fn kill_after_each_change(who: &str) -> Vec<usize> {
    let mut left = Vec::new();
    let mut longest = Duration::ZERO;
    let filled = tempfile::tempdir().unwrap();
    fill(filled.path());
    for step in 0..STEPS_MAX {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("kv");
        // With its times: they say what goes first.
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(filled.path()).arg(&directory);
        assert!(copy.status().unwrap().success());
        let variables = [directory.to_str().unwrap(), &step.to_string(), who];
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .envs(CHILD.into_iter().zip(variables))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if output.status.success() {
            // It had no change left to die after.
            break;
        }
        let died = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert_eq!(died, Some(9), "{}", String::from_utf8_lossy(&output.stderr));
        left.push(chunk_files(&directory).len());

        let what = format!("{who} killed after change {step}");
        let mut janitor = Janitor::open(&directory, settings(None)).unwrap();
        let start = Instant::now();
        while !janitor.tick().unwrap().is_janitor {
            let waited = start.elapsed();
            // Half a second where the lease has no name in it yet.
            assert!(waited < Duration::from_secs(2), "{what}: no janitor");
        }
        longest = longest.max(start.elapsed());
        sweep(&mut janitor, 2);
        let bytes = FILE_BYTES * chunk_files(&directory).len() as u64;
        assert!(bytes <= ROOM * FILE_BYTES, "{what}: {bytes} bytes");
        assert!(bytes >= (ROOM - 2) * FILE_BYTES, "{what}: {bytes} bytes");
        let said = usage(&directory).unwrap();
        let off = said.bytes.unwrap().abs_diff(bytes);
        assert!(off <= bytes / 100, "{what}: {bytes} bytes, {said:?}");
        assert_eq!(said.claimed_ahead_bytes, 0, "{what}");
        // Its own, and nothing of the dead.
        assert_eq!(state(&directory, "account").len(), 1, "{what}");
        let leases = state(&directory, ".");
        assert_eq!(leases.len(), 2, "{what}: {leases:?}");
        janitor.close();
        assert_eq!(usage(&directory).unwrap().stores, 0, "{what}");
        check_chunks(&directory, &what);
        assert!(names(&directory, "tmp").is_empty(), "{what}");
    }
    println!(
        "{who}: killed after each of {} changes, replaced after {longest:?} at most",
        left.len()
    );
    assert!(
        left.len() < STEPS_MAX as usize,
        "the last change was not reached"
    );
    left
}

#[test]
fn a_janitor_may_die_after_any_change() {
    let left = kill_after_each_change("janitor");
    // Chunks go one after the other, and each death came after something else.
    assert!(
        left.is_sorted_by(|before, after| before >= after),
        "{left:?}"
    );
    assert_eq!(left.first(), Some(&(CHUNKS as usize)));
    let removals = CHUNKS as usize - left.last().unwrap();
    assert!(removals >= (CHUNKS - ROOM) as usize, "{left:?}");
    // Beside each removal: the log and the account. Before: account, lease, records to absorb.
    assert!(left.len() >= 3 * removals, "{left:?}");
}

#[test]
fn a_request_may_die_after_any_change() {
    let left = kill_after_each_change("gc");
    assert!(
        left.is_sorted_by(|before, after| before >= after),
        "{left:?}"
    );
    assert_eq!(
        (left.first(), left.last()),
        (Some(&(CHUNKS as usize)), Some(&(ROOM as usize)))
    );
}
