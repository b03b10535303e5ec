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
use kvrail::io::{Observer, Step};
use kvrail::store::capacity::{
    CollectOptions, Janitor, JanitorSettings, JanitorTiming, collect, usage,
};

/// Directory, kind of the change to die at, which of that kind, and who dies.
const CHILD: [&str; 4] = [
    "KVRAIL_TEST_EVICTION_DIRECTORY",
    "KVRAIL_TEST_EVICTION_CHANGE",
    "KVRAIL_TEST_EVICTION_NUMBER",
    "KVRAIL_TEST_EVICTION_WHO",
];
const CHUNKS: u64 = 16;
/// Chunks that there is room for.
const ROOM: u64 = 7;
/// Changes of one kind after which somebody dies: as many as chunks that go. A janitor writes lease
/// and account more often, as time goes by.
const DEATHS_MAX: u64 = 10;

/// All that a janitor and a request change.
const CHANGES: [&str; 11] = [
    "create account",
    "write account",
    "rename to account",
    "remove account",
    "create lease",
    "write lease",
    "remove lease",
    "remove chunk",
    "create log",
    "write log",
    "remove slice",
];

/// Names a kind of change.
fn name(step: &Step<'_>) -> String {
    let (what, path) = match step {
        Step::MakeFolder(path) => ("make folder", path),
        Step::CreateFile(path) => ("create", path),
        Step::WriteFile { path, .. } => ("write", path),
        Step::Rename { target, .. } => ("rename to", target),
        Step::Remove(path) => ("remove", path),
        other => panic!("{other:?}"),
    };
    let text = path.to_str().unwrap();
    let file = path.file_name().unwrap().to_str().unwrap();
    let kind = match file {
        _ if file.starts_with("janitor.") => "lease",
        _ if text.contains("/.kvrail/account/") => "account",
        "evictions.log" => "log",
        _ if file.ends_with(".safetensors") => "chunk",
        _ if file.len() == 3 => "slice",
        _ => file,
    };
    format!("{what} {kind}")
}

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
    let [Ok(directory), Ok(change), Ok(number), Ok(who)] = CHILD.map(std::env::var) else {
        eprintln!("skipped: only meant to be started by the tests that kill it");
        return;
    };
    let last: u64 = number.parse().unwrap();
    let seen = AtomicU64::new(0);
    let observer = Observer::new(move |step| {
        let name = name(step);
        assert!(CHANGES.contains(&name.as_str()), "{name}");
        if name == change && seen.fetch_add(1, Ordering::SeqCst) == last {
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

/// Kills `who` after each of these changes. Returns name, number and the chunks that each left.
fn kill_after_each_change<'a>(who: &str, changes: &[&'a str]) -> Vec<(&'a str, u64, usize)> {
    let mut deaths = Vec::new();
    let mut longest = Duration::ZERO;
    let filled = tempfile::tempdir().unwrap();
    fill(filled.path());
    for change in changes {
        for number in 0..DEATHS_MAX {
            let folder = tempfile::tempdir().unwrap();
            let directory = folder.path().join("kv");
            // With its times: they say what goes first.
            let mut copy = Command::new("cp");
            copy.arg("-a").arg(filled.path()).arg(&directory);
            assert!(copy.status().unwrap().success());
            if !dies(who, &directory, change, number) {
                assert!(number > 0, "{who}: never a {change}");
                break;
            }
            deaths.push((*change, number, chunk_files(&directory).len()));
            let what = format!("{who} killed after {change} {number}");
            longest = longest.max(replace(&directory, &what));
            check_chunks(&directory, &what);
            assert!(names(&directory, "tmp").is_empty(), "{what}");
        }
    }
    println!(
        "{who}: killed after each of {} changes, replaced after {longest:?} at most",
        deaths.len()
    );
    deaths
}

/// Starts a process that dies after a change. Returns whether it did, or had none left.
fn dies(who: &str, directory: &Path, change: &str, number: u64) -> bool {
    let variables = [
        directory.to_str().unwrap(),
        change,
        &number.to_string(),
        who,
    ];
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .envs(CHILD.into_iter().zip(variables))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.success() {
        return false;
    }
    let died = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert_eq!(died, Some(9), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

/// Has another janitor take over and work. Returns how long it took to take over.
fn replace(directory: &Path, what: &str) -> Duration {
    let mut janitor = Janitor::open(directory, settings(None)).unwrap();
    let start = Instant::now();
    while !janitor.tick().unwrap().is_janitor {
        let waited = start.elapsed();
        // Half a second where the lease has no name in it yet.
        assert!(waited < Duration::from_secs(2), "{what}: no janitor");
    }
    let waited = start.elapsed();
    sweep(&mut janitor, 2);
    let bytes = FILE_BYTES * chunk_files(directory).len() as u64;
    assert!(bytes <= ROOM * FILE_BYTES, "{what}: {bytes} bytes");
    assert!(bytes >= (ROOM - 2) * FILE_BYTES, "{what}: {bytes} bytes");
    let said = usage(directory).unwrap();
    let off = said.bytes.unwrap().abs_diff(bytes);
    assert!(off <= bytes / 100, "{what}: {bytes} bytes, {said:?}");
    assert_eq!(said.claimed_ahead_bytes, 0, "{what}");
    // Its own, and nothing of the dead.
    assert_eq!(state(directory, "account").len(), 1, "{what}");
    let leases = state(directory, ".");
    assert_eq!(leases.len(), 2, "{what}: {leases:?}");
    janitor.close();
    assert_eq!(usage(directory).unwrap().stores, 0, "{what}");
    waited
}

/// Checks that each removal of a chunk was the last change of some process.
fn assert_removals(deaths: &[(&str, u64, usize)], left_at_last: u64) {
    let removals = deaths.iter().filter(|death| death.0 == "remove chunk");
    let found: Vec<_> = removals.map(|death| (death.1, death.2)).collect();
    let wanted: Vec<_> = (0..CHUNKS - left_at_last)
        .map(|number| (number, (CHUNKS - number - 1) as usize))
        .collect();
    assert_eq!(found, wanted);
}

#[test]
fn a_janitor_may_die_after_any_change() {
    let changes: Vec<_> = CHANGES
        .into_iter()
        .filter(|name| *name != "remove slice")
        .collect();
    // The low watermark is 90% of the room.
    assert_removals(&kill_after_each_change("janitor", &changes), ROOM - 1);
}

#[test]
fn a_request_may_die_after_any_change() {
    let changes: Vec<_> = CHANGES
        .into_iter()
        .filter(|name| {
            !name.ends_with("lease") && !matches!(*name, "rename to account" | "remove account")
        })
        .collect();
    assert_removals(&kill_after_each_change("gc", &changes), ROOM);
}
