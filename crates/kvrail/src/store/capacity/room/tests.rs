//! Rooms that claim at once, and records that are absorbed while they are read.

use super::*;
use crate::io::Permissions;

const MIB: u64 = 1 << 20;

fn root_of(path: &std::path::Path) -> Root {
    Root::new(path, Permissions::default())
}

fn room(root: &std::path::Path, limit: u64) -> Room {
    Room::open(root_of(root), Some(limit), SystemTime::now, true).unwrap()
}

#[test]
fn rooms_never_claim_more_than_the_limit_together() {
    let root = tempfile::tempdir().unwrap();
    let limit = 1000 * MIB;
    let stored: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let root = root.path();
                scope.spawn(move || {
                    let room = room(root, limit);
                    let mut stored = 0;
                    for _ in 0..600 {
                        if room.claim(MIB).is_ok() {
                            room.stored(MIB);
                            stored += MIB;
                        } else {
                            std::thread::sleep(REFUSED_FOR / 10);
                        }
                    }
                    room.retire().unwrap();
                    stored
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let sum = read_all(&root_of(root.path()).accounts().unwrap()).unwrap();
    assert_eq!((sum.claimed, sum.used), (stored, stored));
    assert!(stored <= limit, "{stored}");
    // What the others hold ahead when one is refused is at most 0.5%.
    assert!(stored >= limit / 1000 * 995, "{stored}");
}

#[test]
fn nothing_is_claimed_while_usage_is_unknown_or_beyond_the_limit() {
    let root = tempfile::tempdir().unwrap();
    let room = Room::open(root_of(root.path()), Some(10), SystemTime::now, false).unwrap();
    let error = room.claim(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("not counted yet"), "{error}");
    room.correct(8);
    std::thread::sleep(REFUSED_FOR);
    room.claim(2).unwrap();
    let error = room.claim(1).unwrap_err();
    assert!(error.to_string().contains("8 bytes are stored"), "{error}");
    room.unclaim(2);
    room.claim(2).unwrap();
}

#[test]
fn a_sum_misses_nothing_while_records_are_absorbed() {
    let root = tempfile::tempdir().unwrap();
    let janitor = room(root.path(), u64::MAX / 2);
    let looker = room(root.path(), u64::MAX / 2);
    let ended = AtomicBool::new(false);
    let stored = AtomicI64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                let other = room(root.path(), u64::MAX / 2);
                other.claim(100).unwrap();
                other.stored(100);
                other.retire().unwrap();
                stored.fetch_add(100, Ordering::SeqCst);
                let sum = janitor.look().unwrap();
                let name = other.name();
                let named = sum.records.iter().find(|named| named.name == name);
                janitor.absorb(&name, &named.unwrap().record).unwrap();
                let accounts = root_of(root.path()).accounts().unwrap();
                accounts.remove_file(&name).unwrap();
            }
            ended.store(true, Ordering::Relaxed);
        });
        while !ended.load(Ordering::Relaxed) {
            let before = stored.load(Ordering::SeqCst);
            // It may be more: what is absorbed while it is read may count twice.
            let used = signed(looker.look().unwrap().used);
            assert!(used >= before, "{used}, {before} were stored");
        }
    });
    assert_eq!(looker.look().unwrap().used, 300 * 100);
}

#[test]
fn a_sum_takes_off_nothing_twice_while_records_are_absorbed() {
    let root = tempfile::tempdir().unwrap();
    let janitor = room(root.path(), u64::MAX / 2);
    let looker = room(root.path(), u64::MAX / 2);
    let there = 1 << 40;
    janitor.claim(there).unwrap();
    janitor.stored(there);
    janitor.flush().unwrap();
    let ended = AtomicBool::new(false);
    let removed = AtomicI64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                // Two at once: the janitor's record names the last one only.
                let others = [(); 2].map(|()| {
                    let other = room(root.path(), u64::MAX / 2);
                    removed.fetch_add(100, Ordering::SeqCst);
                    other.removed(100);
                    other.retire().unwrap();
                    other.name()
                });
                let sum = janitor.look().unwrap();
                let accounts = root_of(root.path()).accounts().unwrap();
                for name in others {
                    let named = sum.records.iter().find(|named| named.name == name);
                    janitor.absorb(&name, &named.unwrap().record).unwrap();
                    accounts.remove_file(&name).unwrap();
                }
            }
            ended.store(true, Ordering::Relaxed);
        });
        while !ended.load(Ordering::Relaxed) {
            let used = signed(looker.look().unwrap().used);
            let least = signed(there) - removed.load(Ordering::SeqCst);
            assert!(used >= least, "{used}, but {least} at least are there");
        }
    });
    assert_eq!(looker.look().unwrap().used, there - 600 * 100);
}

#[test]
fn a_record_that_was_absorbed_is_begun_again() {
    let root = tempfile::tempdir().unwrap();
    let (alive, janitor) = (room(root.path(), 1000), room(root.path(), 1000));
    for round in 1..=3 {
        alive.claim(100).unwrap();
        alive.stored(100);
        alive.flush().unwrap();
        let sum = janitor.look().unwrap();
        let name = alive.name();
        let record = sum
            .records
            .iter()
            .find(|named| named.name == name)
            .unwrap()
            .record;
        janitor.absorb(&name, &record).unwrap();
        let accounts = root_of(root.path()).accounts().unwrap();
        accounts.remove_file(&name).unwrap();
        alive.claim(1).unwrap();
        alive.stored(1);
        alive.flush().unwrap();
        assert_ne!(alive.name(), name);
        let sum = janitor.look().unwrap();
        assert!(sum.used.abs_diff(round * 101) <= 20, "{}", sum.used);
    }
}

#[test]
fn the_clock_of_the_file_system_counts() {
    let root = tempfile::tempdir().unwrap();
    let ahead: WallClock = || SystemTime::now() + Duration::from_secs(3600);
    let behind: WallClock = || SystemTime::now() - Duration::from_secs(3600);
    let times = [ahead, behind].map(|clock| {
        let room = Room::open(root_of(root.path()), None, clock, true).unwrap();
        room.now_milliseconds()
    });
    let now = milliseconds(SystemTime::now());
    assert!(
        times.iter().all(|time| time.abs_diff(now) < 2000),
        "{times:?}"
    );
}

/// Takes a room's record over, as a janitor does with one whose owner seems dead.
fn absorb(janitor: &Room, root: &std::path::Path, name: &str) {
    let accounts = root_of(root).accounts().unwrap();
    let record = read(&accounts, name).unwrap().unwrap();
    janitor.absorb(name, &record).unwrap();
    accounts.remove_file(name).unwrap();
}

#[test]
fn what_was_left_of_a_record_that_was_absorbed_is_claimed_anew() {
    let root = tempfile::tempdir().unwrap();
    let (alive, janitor) = (room(root.path(), 10_000), room(root.path(), 10_000));
    alive.claim(10).unwrap();
    alive.claim(20).unwrap();
    let (left, portion) = {
        let own = alive.lock();
        (own.left, own.portion)
    };
    assert!(0 < left && left < portion, "{left} of {portion}");
    absorb(&janitor, root.path(), &alive.name());
    // More than a portion, and less with what was left.
    alive.claim(portion + 1).unwrap();
    assert_eq!(alive.lock().left, 0);
    let sum = janitor.look().unwrap();
    assert_eq!(sum.claimed, (30 + left) + (portion + 1));
    assert!(alive.claim(20_000).is_err(), "the limit holds");
}

#[test]
fn an_account_outlives_its_path_being_away() {
    let folder = tempfile::tempdir().unwrap();
    let (root, away) = (folder.path().join("kv"), folder.path().join("away"));
    std::fs::create_dir(&root).unwrap();
    let janitor = room(&root, 1000);
    janitor.claim(10).unwrap();
    janitor.stored(10);
    janitor.correct(500);
    janitor.flush().unwrap();
    std::fs::rename(&root, &away).unwrap();
    // A file in the way of the path, so that nothing can be made there.
    std::fs::write(&root, "").unwrap();
    for _ in 0..5 {
        assert!(janitor.claim(200).is_err());
        std::thread::sleep(REFUSED_FOR);
        janitor.lock().written_at = None;
        assert!(janitor.flush().is_err());
    }
    std::fs::remove_file(&root).unwrap();
    std::fs::rename(&away, &root).unwrap();
    janitor.flush().unwrap();
    let sum = janitor.look().unwrap();
    assert_eq!((sum.used, sum.claimed), (510, 510));
    janitor.claim(200).unwrap();
    assert!(janitor.claim(400).is_err());
}

#[test]
fn a_record_whose_absorption_was_noticed_in_a_bad_moment_is_begun_again_once() {
    let root = tempfile::tempdir().unwrap();
    let (alive, janitor) = (room(root.path(), 1000), room(root.path(), 1000));
    alive.claim(100).unwrap();
    alive.stored(100);
    alive.correct(300);
    alive.flush().unwrap();
    absorb(&janitor, root.path(), &alive.name());
    alive.correct(7);
    // Nothing can be made in the folder of accounts for a while.
    let accounts = root.path().join(".kvrail/account");
    let hidden = root.path().join("hidden");
    std::fs::rename(&accounts, &hidden).unwrap();
    std::fs::write(&accounts, "").unwrap();
    for _ in 0..5 {
        assert!(alive.flush().is_err());
    }
    std::fs::remove_file(&accounts).unwrap();
    std::fs::rename(&hidden, &accounts).unwrap();
    alive.flush().unwrap();
    let sum = janitor.look().unwrap();
    assert_eq!((sum.used, sum.claimed), (407, 407));
}

#[test]
fn a_path_that_somebody_removed_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("kv");
    std::fs::create_dir(&root).unwrap();
    let room = room(&root, 1000);
    room.claim(100).unwrap();
    room.stored(100);
    std::fs::remove_dir_all(&root).unwrap();
    room.correct(0);
    room.flush().unwrap();
    assert!(root.join(".kvrail/account").is_dir());
}

#[test]
fn accounts_on_a_mount_with_another_number_are_the_same_accounts() {
    let root = tempfile::tempdir().unwrap();
    let mut elsewhere = root_of(root.path());
    let janitor = room(root.path(), 1000);
    elsewhere.set_device(u64::MAX);
    let alive = Room {
        root: elsewhere,
        ..room(root.path(), 1000)
    };
    alive.claim(100).unwrap();
    absorb(&janitor, root.path(), &alive.name());
    alive.correct(0);
    alive.flush().unwrap();
    alive.claim(100).unwrap();
}
