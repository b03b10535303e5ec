//! A file system that does what it is asked and says that it did not, or removes nothing: what is
//! there is found, what takes room keeps it, and nothing is taken off the account twice.
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
use std::time::Duration;

use common::mount;
use kvrail::store::capacity::{Janitor, JanitorSettings, JanitorTiming, Removals, usage};
use store::{
    Cache, FILE_BYTES, Geometry, LIMIT, chunk_files, limited, names, open, open_as, wait_until,
};

fn used(source: &Path) -> u64 {
    usage(source).unwrap().bytes.unwrap()
}

fn temp_files(source: &Path) -> usize {
    names(source, "tmp")
        .iter()
        .filter(|name| name.starts_with(".chunk."))
        .count()
}

/// What a janitor that never waits keeps to, with room for so many chunks.
fn quick_janitor(chunks: u64) -> JanitorSettings {
    JanitorSettings {
        timing: JanitorTiming {
            tick: Duration::from_millis(20),
            pass: Duration::from_millis(1),
            ..JanitorTiming::default()
        },
        ..JanitorSettings::new(&limited(Path::new("/"), chunks * FILE_BYTES))
    }
}

#[test]
fn a_rename_that_was_done_and_denied_is_done() {
    let Some(mounted) = mount(41) else {
        return;
    };
    let store = open(mounted.path());
    let cache = Cache::attach(&store, 0, Geometry::default());
    mounted.set("rename *.safetensors done=EIO");
    (0..5).for_each(|index| assert_eq!(cache.store_alone(index).stored, 1));
    assert!(mounted.hits() >= 5, "nothing was denied");
    mounted.heal();
    assert_eq!(chunk_files(mounted.source()).len(), 5);
    store.close(LIMIT).unwrap();
    assert_eq!(used(mounted.source()), 5 * FILE_BYTES);
}

#[test]
fn what_was_renamed_while_nobody_could_say_so_keeps_its_room() {
    let Some(mounted) = mount(42) else {
        return;
    };
    let store = open_as(&limited(mounted.path(), 3 * FILE_BYTES));
    let cache = Cache::attach(&store, 0, Geometry::default());
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    // The kernel's look for what is to be replaced goes well, the one after the rename does not.
    mounted.set("rename *.safetensors done=EIO\nlookup *.safetensors error=EIO skip=1");
    assert_eq!(cache.store_alone(1).failed, 1);
    mounted.heal();
    let there = chunk_files(mounted.source()).len() as u64;
    assert_eq!(there, 1, "it was to be renamed");
    let claimed = || {
        let said = usage(mounted.source()).unwrap();
        said.bytes.unwrap() + said.claimed_ahead_bytes
    };
    // The record is written with the next sign of life.
    let took = wait_until("its room is claimed", || claimed() >= FILE_BYTES);
    println!("claimed after {took:.2?}");
    std::thread::sleep(Duration::from_millis(700));
    assert!(
        claimed() >= FILE_BYTES,
        "the room of a chunk that is there was given back"
    );
    store.close(LIMIT).unwrap();
}

#[test]
fn a_temp_file_that_cannot_be_removed_keeps_its_room_until_it_is_gone() {
    let Some(mounted) = mount(43) else {
        return;
    };
    let room = 4;
    let store = open_as(&limited(mounted.path(), room * FILE_BYTES));
    let cache = Cache::attach(&store, 0, Geometry::default());
    wait_until("a janitor", || store.metrics().janitor_paths == 1);
    mounted.set("write *.chunk.* error=EIO\nunlink *.chunk.* error=EIO");
    let mut index = 0;
    // Until three are left behind; stores rest after errors in a row.
    let took = wait_until("three temp files", || {
        index += 1;
        let _ = cache.store_alone(index);
        temp_files(mounted.source()) >= 3
    });
    println!("three after {took:.2?}, {index} stores");
    mounted.set("unlink *.chunk.* error=EIO");
    let left = temp_files(mounted.source()) as u64;
    // There is room for what they leave, and no more.
    let took = wait_until("the rest is used", || {
        index += 1;
        let _ = cache.store_alone(index);
        let full = chunk_files(mounted.source()).len() as u64 + left;
        assert!(full <= room, "{full} files in room for {room}");
        full == room
    });
    println!("full after {took:.2?}");
    let files = chunk_files(mounted.source()).len() as u64 + left;
    assert_eq!(files, room);

    mounted.heal();
    let took = wait_until("the temp files go", || temp_files(mounted.source()) == 0);
    println!("gone after {took:.2?}");
    let took = wait_until("their room is used", || {
        index += 1;
        cache.store_alone(index).stored == 1
    });
    println!("stored after {took:.2?}");
    store.close(LIMIT).unwrap();
    assert!(used(mounted.source()) <= room * FILE_BYTES);
}

#[test]
fn chunks_that_a_file_system_does_not_let_go_are_not_taken_for_gone() {
    let Some(mounted) = mount(44) else {
        return;
    };
    let (there, limit) = (30, 20);
    let store = open(mounted.source());
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..there).for_each(|index| assert_eq!(cache.store_alone(index).stored, 1));
    store.close(LIMIT).unwrap();
    // As if they were gone: so a janitor is told whose chunk another one has removed.
    mounted.set("unlink *.safetensors error=ESTALE");
    let mut janitor = Janitor::open(mounted.path(), quick_janitor(limit)).unwrap();
    let (mut passes, mut ticks) = (0, 0);
    while passes < 5 {
        passes += janitor.tick().unwrap().passes;
        ticks += 1;
        assert!(ticks < 10_000, "{passes} passes");
        let said = used(mounted.source());
        assert!(said >= there * FILE_BYTES, "{said} after {passes} passes");
    }
    mounted.heal();
    wait_until("eviction", || {
        janitor.tick().unwrap();
        used(mounted.source()) <= limit * FILE_BYTES
    });
    let files = chunk_files(mounted.source()).len() as u64;
    assert!(files <= limit && used(mounted.source()) == files * FILE_BYTES);
    janitor.close();
}

#[test]
fn what_leaves_the_quarantine_while_a_janitor_looks_there_is_taken_off_once() {
    let Some(mounted) = mount(45) else {
        return;
    };
    let (chunks, aside) = (30, 10);
    let store = open(mounted.source());
    let cache = Cache::attach(&store, 0, Geometry::default());
    (0..chunks).for_each(|index| assert_eq!(cache.store_alone(index).stored, 1));
    store.close(LIMIT).unwrap();
    let files = chunk_files(mounted.source());
    let namespace = files[0].ancestors().nth(3).unwrap();
    let quarantine = namespace.join("quarantine");
    std::fs::create_dir(&quarantine).unwrap();
    let set_aside: Vec<_> = files[..aside]
        .iter()
        .enumerate()
        .map(|(index, file)| {
            let name = file.file_name().unwrap().to_str().unwrap();
            let target = quarantine.join(format!("{:020}-g0r0-{name}", index + 1));
            std::fs::rename(file, &target).unwrap();
            target
        })
        .collect();

    let mut janitor = Janitor::open(mounted.path(), quick_janitor(1000)).unwrap();
    let mut tick = || {
        let passes = janitor.tick().unwrap().passes;
        let said = used(mounted.source());
        (passes, said)
    };
    wait_until("a count", || tick().0 > 0);
    // It looks at the quarantine last, and takes its time for that.
    mounted.set("opendir,readdir *quarantine delay=150ms");
    let looks = mounted.hits();
    std::thread::scope(|scope| {
        let remover = scope.spawn(|| {
            wait_until("a look", || mounted.hits() > looks);
            let mut removals = Removals::open(mounted.source()).unwrap();
            for file in &set_aside {
                std::fs::remove_file(file).unwrap();
                removals.note(FILE_BYTES);
            }
            // What the janitor makes of it, it makes now.
            std::thread::sleep(Duration::from_millis(700));
            removals.end().unwrap();
        });
        while !remover.is_finished() {
            tick();
        }
    });
    mounted.heal();
    let there = (chunks - aside as u64) * FILE_BYTES;
    let (_, said) = tick();
    assert!(said >= there, "{said}, but {there} are there");
    wait_until("the account is right", || tick().1 == there);
    janitor.close();
}
