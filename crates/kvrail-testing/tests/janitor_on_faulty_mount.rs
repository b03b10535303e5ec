//! A janitor on a file system that hangs or fails: the path is taken out of use, left alone, and
//! used again; and what fails for ever stops nothing else.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::path::Path;
use std::time::{Duration, Instant};

use common::mount;
use kvrail::Store;
use kvrail::config::StoreConfig;
use kvrail::store::capacity::{Janitor, JanitorSettings, usage};
use store::{Cache, FILE_BYTES, Geometry, LIMIT, chunk_bytes, key, limited, open_as, wait_until};

const ROOM_BYTES: u64 = 20 * FILE_BYTES;

fn open(path: &Path) -> Store {
    open_as(&StoreConfig {
        wait_limit_seconds: 1.0,
        ..limited(path, ROOM_BYTES)
    })
}

#[test]
fn a_janitor_that_hangs_takes_the_path_out_and_works_again_when_it_is_well() {
    let Some(mounted) = mount(31) else {
        return;
    };
    let store = open(mounted.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    mounted.set("unlink *.safetensors hang");
    let mut index = 0;
    // Nothing but the eviction hangs; that is what takes the path out.
    let took = wait_until("the path is out", || {
        index += 1;
        cache.store(&[(index, vec![0, 1])]);
        store.metrics().paths_taken_out > 0
    });
    println!("out after {took:.2?}, with {index} stores");
    let said = store.take_notices();
    let is_said = |part: &str| said.iter().any(|notice| notice.message.contains(part));
    assert!(is_said("a step of the janitor was not done"), "{said:?}");

    mounted.heal();
    let took = wait_until("eviction", || {
        index += 1;
        cache.store(&[(index, vec![0, 1])]);
        store.metrics().chunks_evicted_size > 0 && store.metrics().paths_taken_back > 0
    });
    println!("evicts again after {took:.2?}");
    store.close(LIMIT).unwrap();
    let bytes = chunk_bytes(mounted.source());
    assert!(bytes <= ROOM_BYTES, "{bytes}");
    // What was removed while it hung is not told, as somebody may have counted meanwhile: the next
    // count finds it.
    let said = usage(mounted.source()).unwrap().bytes.unwrap();
    let told = bytes..=bytes + FILE_BYTES;
    assert!(told.contains(&said), "{said} for {bytes}");
}

#[test]
fn a_path_that_is_out_is_left_alone_by_the_janitor_too() {
    let Some(mounted) = mount(32) else {
        return;
    };
    let store = open(mounted.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store(&[(1, vec![0, 1])]).stored, 1);
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    // Loads hang, and so do probes; the janitor's own files answer, and are counted.
    mounted.set("open,read *-*/* hang\n* .kvrail* delay=1ms");
    let before = mounted.hits();
    std::thread::sleep(Duration::from_secs(2));
    let touched = mounted.hits() - before;
    assert!(touched > 10, "{touched} operations of a janitor at work");
    assert_eq!(cache.load(&[(1, 0, vec![4, 5])]).loaded, 0);
    wait_until("the path is out", || store.metrics().paths_taken_out > 0);
    // A tick that was under way ends.
    std::thread::sleep(Duration::from_secs(1));
    let before = mounted.hits();
    std::thread::sleep(Duration::from_secs(2));
    let touched = mounted.hits() - before;
    // A probe or two.
    assert!(touched <= 4, "{touched} operations on a path that is out");
    assert_eq!(store.metrics().janitor_paths, 0);
    mounted.heal();
    let took = wait_until("a janitor again", || {
        store.metrics().paths_taken_back > 0 && store.metrics().janitor_paths == 1
    });
    println!("janitor again {took:.2?} after the mount is well");
    store.close(LIMIT).unwrap();
}

#[test]
fn a_folder_that_always_fails_keeps_no_account_from_being_known() {
    let Some(mounted) = mount(33) else {
        return;
    };
    // Chunks that were there before anybody kept an account.
    let before = store::open(mounted.source());
    let cache = Cache::attach(&before, 0, Geometry::default());
    (0..10).for_each(|index| assert_eq!(cache.store_alone(index).stored, 1));
    before.close(LIMIT).unwrap();
    std::fs::remove_dir_all(mounted.source().join(".kvrail")).unwrap();
    let slice = &key(3).to_string()[..3];
    mounted.set(&format!(
        "lookup,getattr,open,opendir,readdir *-*/g0r0/{slice}* error=EIO"
    ));

    let store = open(mounted.path());
    let took = wait_until("a count", || store.metrics().usage_bytes > 0);
    println!("known after {took:.2?}");
    assert!(mounted.hits() > 0, "nothing failed");
    // The slice that fails is taken for an average one.
    let said = usage(mounted.source()).unwrap().bytes.unwrap();
    assert!(said.abs_diff(9 * FILE_BYTES) <= FILE_BYTES / 100, "{said}");
    let cache = Cache::attach(&store, 0, Geometry::default());
    assert_eq!(cache.store_alone(100).stored, 1);
    store.close(LIMIT).unwrap();
}

#[test]
fn a_store_that_is_dropped_waits_a_second_for_a_janitor_that_hangs() {
    let Some(mounted) = mount(35) else {
        return;
    };
    let store = open(mounted.path());
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    mounted.set("* * hang");
    wait_until("a hang", || mounted.hits() > 0);
    let start = Instant::now();
    drop(store);
    println!("dropping took {:.2?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_millis(1900));
    mounted.heal();
}

/// Chunks that were stored before, and a janitor that finds too much there.
fn overfull(mounted: &common::Mounted) -> Janitor {
    let before = store::open(mounted.source());
    let cache = Cache::attach(&before, 0, Geometry::default());
    for index in 0..40 {
        let report = cache.store_alone(index);
        assert_eq!(report.stored + report.already_present, 1);
    }
    before.close(LIMIT).unwrap();
    janitor(mounted)
}

/// A janitor that counts all there is in two hours, when nothing is the matter.
fn janitor(mounted: &common::Mounted) -> Janitor {
    let settings = JanitorSettings::new(&limited(mounted.path(), ROOM_BYTES));
    Janitor::open(mounted.path(), settings).unwrap()
}

#[test]
fn a_folder_that_always_fails_keeps_no_other_from_eviction_and_all_is_counted() {
    let Some(mounted) = mount(36) else {
        return;
    };
    let mut janitor = overfull(&mounted);
    // In every slice there is one that cannot be read.
    let namespace = std::fs::read_dir(mounted.source())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.join("g0r0").is_dir())
        .unwrap();
    std::fs::create_dir(namespace.join("g0r1")).unwrap();
    mounted.set("lookup,getattr,open,opendir,readdir *-*/g0r1/* error=EIO");
    let (mut evicted, mut faults) = (0, 0);
    let took = wait_until("eviction", || {
        let tick = janitor.tick().unwrap();
        evicted += tick.visit.for_size.chunks;
        faults += usize::from(janitor.take_fault().is_some());
        chunk_bytes(mounted.source()) <= ROOM_BYTES && !tick.busy
    });
    println!("{evicted} chunks in {took:.2?}, {faults} faults");
    assert!(evicted >= 20, "{evicted}");
    assert!(faults > 0, "nothing failed");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_disk_that_takes_not_a_byte_more_is_made_room_on() {
    let Some(mounted) = mount(37) else {
        return;
    };
    for is_janitor_before in [true, false] {
        let mut janitor = overfull(&mounted);
        let tick = janitor.tick().unwrap();
        assert!(tick.is_janitor);
        let full = "write,create,mkdir * error=ENOSPC";
        if is_janitor_before {
            mounted.set(full);
        } else {
            janitor.close();
            mounted.set(full);
            janitor = self::janitor(&mounted);
        }
        let mut faults = 0;
        wait_until("eviction", || {
            let tick = janitor.tick().unwrap();
            faults += usize::from(janitor.take_fault().is_some());
            chunk_bytes(mounted.source()) <= ROOM_BYTES && !tick.busy
        });
        assert!(faults > 0, "nothing failed");
        // And no more than that, however long it lasts.
        for _ in 0..5 {
            janitor.tick().unwrap();
        }
        let left = chunk_bytes(mounted.source());
        assert!(left > ROOM_BYTES / 10 * 8, "{left} of {ROOM_BYTES}");
        mounted.heal();
        // What could not be said is found by a count.
        let took = wait_until("the account", || {
            janitor.tick().unwrap();
            let found = chunk_bytes(mounted.source());
            usage(mounted.source()).unwrap().bytes == Some(found)
        });
        println!("the account is right {took:.2?} later");
        janitor.close();
    }
}

#[test]
fn folders_that_are_slow_to_look_for_are_no_janitor_that_hangs() {
    let Some(mounted) = mount(38) else {
        return;
    };
    let before = store::open(mounted.source());
    let cache = Cache::attach(&before, 0, Geometry::default());
    assert_eq!(cache.store_alone(1).stored, 1);
    before.close(LIMIT).unwrap();
    let namespace = std::fs::read_dir(mounted.source())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.join("g0r0").is_dir())
        .unwrap();
    (1..300).for_each(|rank| std::fs::create_dir(namespace.join(format!("g0r{rank}"))).unwrap());
    mounted.set("lookup *-*/g0r*/* delay=10ms");
    let store = open(mounted.path());
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    let before = mounted.hits();
    wait_until("a slice", || mounted.hits() > before + 350);
    assert_eq!(store.metrics().paths_taken_out, 0);
    mounted.heal();
    store.close(LIMIT).unwrap();
}

#[test]
fn a_janitor_that_cannot_know_its_account_for_a_folder_that_fails_does_not_spin() {
    let Some(mounted) = mount(39) else {
        return;
    };
    let before = store::open(mounted.source());
    let cache = Cache::attach(&before, 0, Geometry::default());
    assert_eq!(cache.store_alone(1).stored, 1);
    before.close(LIMIT).unwrap();
    std::fs::remove_dir_all(mounted.source().join(".kvrail")).unwrap();
    mounted.set("lookup,getattr,open,opendir,readdir *-*/g0r0/* error=EIO");
    let settings = JanitorSettings::new(&limited(mounted.path(), ROOM_BYTES));
    let mut janitor = Janitor::open(mounted.path(), settings).unwrap();
    wait_until("a fault", || {
        janitor.tick().unwrap();
        janitor.take_fault().is_some()
    });
    let tick = janitor.tick().unwrap();
    assert!(!tick.busy, "it rests between two ticks");
    let before = mounted.hits();
    janitor.tick().unwrap();
    let hits = mounted.hits() - before;
    assert!(hits < 50, "{hits} operations in one tick");
}
