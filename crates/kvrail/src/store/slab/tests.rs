//! The store of a slab, with real files.

use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::chunk::ChunkKey;
use crate::config::StoreConfig;
use crate::memory::Region;
use crate::store::{Namespace, OpenOptions};

const ALIGN: usize = 4096;
const SLAB: usize = 1 << 20;
const OBJECT: usize = 3 * 4096 + 512;
const LIMIT: Duration = Duration::from_secs(20);

struct Bench {
    slab: Slab,
    store: SlabStore,
    kind: KindId,
}

impl Bench {
    fn new(root: &Path) -> Self {
        Self::with(root, |_| {})
    }

    fn with(root: &Path, change: impl FnOnce(&mut StoreConfig)) -> Self {
        let mut config = StoreConfig::with_path(root);
        // Room for a few objects only, so that stores must wait for buffers.
        config.buffer_mib = 1;
        change(&mut config);
        let slab = Slab {
            region: Region::zeroed(SLAB).unwrap(),
            address: 0x10_0000,
            align: ALIGN,
        };
        let store = SlabStore::new(&config, OpenOptions::default(), slab.clone()).unwrap();
        let namespace = Namespace::new("m", serde_json::Map::new()).unwrap();
        let kind = store.kind(namespace, OBJECT).unwrap();
        Self { slab, store, kind }
    }

    fn name(&self, index: u8) -> ObjectName {
        ObjectName {
            kind: self.kind,
            group: 1,
            rank: 0x0201_0201,
            key: ChunkKey::from_bytes(&[index; 32]).unwrap(),
        }
    }

    fn object(&self, index: u8, slot: usize) -> SlabObject {
        SlabObject {
            name: self.name(index),
            address: self.slab.address + slot * 4 * ALIGN,
        }
    }

    fn fill(&self, slot: usize, byte: u8) {
        let bytes = vec![byte; OBJECT];
        self.slab.region.copy_in(slot * 4 * ALIGN, &bytes).unwrap();
    }

    fn bytes(&self, slot: usize) -> Vec<u8> {
        let mut bytes = vec![0; OBJECT];
        self.slab
            .region
            .copy_out(slot * 4 * ALIGN, &mut bytes)
            .unwrap();
        bytes
    }

    fn store(&self, objects: Vec<SlabObject>) -> Vec<ObjectEnding> {
        let task = self.store.submit_store(objects);
        let mut done = wait(|| Some(self.store.take_stores()).filter(|done| !done.is_empty()));
        let (id, endings) = done.remove(0);
        assert_eq!(id, task);
        endings
    }

    fn load(&self, objects: Vec<SlabObject>) -> Vec<bool> {
        let task = self.store.submit_load(objects);
        wait(|| self.store.take_load(task))
    }

    fn look_up(&self, names: Vec<ObjectName>) -> Vec<bool> {
        let task = self.store.submit_lookup(names);
        wait(|| self.store.take_lookup(task))
    }
}

fn wait<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(Instant::now() < end, "no end within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn objects_go_to_files_and_come_back_elsewhere_in_the_slab() {
    let root = tempfile::tempdir().unwrap();
    let bench = Bench::new(root.path());
    for index in 0..20 {
        bench.fill(index, index as u8 + 1);
    }
    let objects: Vec<_> = (0..20).map(|i| bench.object(i as u8, i)).collect();
    assert_eq!(bench.store(objects.clone()), vec![ObjectEnding::Stored; 20]);
    assert_eq!(
        bench.store(objects[..1].to_vec()),
        [ObjectEnding::AlreadyPresent]
    );
    bench.store.close(LIMIT).unwrap();

    let later = Bench::new(root.path());
    let names = [3, 99, 5].map(|index| later.name(index)).to_vec();
    assert_eq!(later.look_up(names), [true, false, true]);
    let objects = vec![
        later.object(3, 40),
        later.object(99, 41),
        later.object(5, 42),
    ];
    assert_eq!(later.load(objects), [true, false, true]);
    assert_eq!(later.bytes(40), vec![4; OBJECT]);
    assert_eq!(later.bytes(41), vec![0; OBJECT]);
    assert_eq!(later.bytes(42), vec![6; OBJECT]);
    // What lies behind an object in the slab is not the load's.
    let mut rest = vec![1; 4 * ALIGN - OBJECT];
    later
        .slab
        .region
        .copy_out(40 * 4 * ALIGN + OBJECT, &mut rest)
        .unwrap();
    assert!(rest.iter().all(|byte| *byte == 0));
}

#[test]
fn removed_objects_are_gone_and_can_be_stored_again() {
    let root = tempfile::tempdir().unwrap();
    let bench = Bench::with(root.path(), |config| config.max_size = Some(1 << 30));
    bench.fill(0, 7);
    assert_eq!(
        bench.store(vec![bench.object(1, 0)]),
        [ObjectEnding::Stored]
    );
    assert_eq!(bench.look_up(vec![bench.name(1)]), [true]);
    let removed = bench
        .store
        .remove(vec![bench.name(1), bench.name(2)], LIMIT)
        .unwrap();
    assert!(removed[0] > OBJECT as u64 && removed[1] == 0, "{removed:?}");
    assert_eq!(bench.look_up(vec![bench.name(1)]), [false]);
    assert_eq!(
        bench.store(vec![bench.object(1, 0)]),
        [ObjectEnding::Stored]
    );
}

#[test]
fn what_lies_outside_the_slab_is_missed_alone() {
    let root = tempfile::tempdir().unwrap();
    let bench = Bench::new(root.path());
    let mut outside = bench.object(2, 0);
    outside.address = 64;
    let endings = bench.store(vec![outside, bench.object(1, 0)]);
    assert_eq!(endings, [ObjectEnding::Missed, ObjectEnding::Stored]);
    assert_eq!(bench.load(vec![outside, bench.object(1, 1)]), [false, true]);
    let mut unknown = bench.object(1, 0);
    unknown.name.kind = KindId::from_number(7);
    assert_eq!(bench.store(vec![unknown]), [ObjectEnding::Missed]);
    let notices = bench.store.take_notices();
    assert!(
        notices.iter().any(|notice| notice.message.contains("0x40")),
        "{notices:?}"
    );
}

#[test]
fn a_directory_that_cannot_be_made_costs_misses_and_one_warning() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let bench = Bench::new(&file);
    for _ in 0..3 {
        assert_eq!(
            bench.store(vec![bench.object(1, 0)]),
            [ObjectEnding::Missed]
        );
    }
    assert_eq!(bench.look_up(vec![bench.name(1)]), [false]);
    assert_eq!(bench.load(vec![bench.object(1, 0)]), [false]);
    let notices = bench.store.take_notices();
    let opened = notices
        .iter()
        .filter(|notice| notice.message.contains("gds_path"));
    assert!(opened.count() >= 1, "{notices:?}");
}

#[test]
fn every_task_ends_when_the_store_closes() {
    let root = tempfile::tempdir().unwrap();
    let bench = Bench::new(root.path());
    let tasks: Vec<_> = (0..50)
        .map(|i| bench.store.submit_load(vec![bench.object(i, 0)]))
        .collect();
    bench.store.close(LIMIT).unwrap();
    for task in tasks {
        assert_eq!(wait(|| bench.store.take_load(task)), [false]);
    }
    assert_eq!(
        bench.load(vec![bench.object(1, 0)]),
        [false],
        "after the end"
    );
    assert_eq!(
        bench.store(vec![bench.object(1, 0)]),
        [ObjectEnding::Missed]
    );
}
