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
