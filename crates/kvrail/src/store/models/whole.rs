//! A whole store on real files: its workers, lookup threads, watch and I/O engine are all part of
//! the model.

use std::path::{Path, PathBuf};

use shuttle::rand::{Rng, thread_rng};
use tempfile::TempDir;

use super::{LONG, explore};
use crate::chunk::{ChunkKey, ChunkRef, PAGE_BYTES};
use crate::config::{EngineChoice, MinFree, StoreConfig};
use crate::io::{Observer, Step};
use crate::layout::{KvLayout, LayerSpan};
use crate::memory::Region;
use crate::store::{KvCache, LoadChunk, Namespace, OpenOptions, Store, StoreChunk};
use crate::sync::{channel, thread};

/// Where each run of a model makes its directory. What a store writes that was dropped in flight
/// may come while that is removed; this goes when all runs are over, and their threads.
fn directories() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().to_path_buf();
    (root, path)
}

fn open(
    path: &Path,
    wait_limit_seconds: f64,
    observer: Option<Observer>,
) -> (Store, KvCache, Region) {
    let mut config = StoreConfig::with_path(path);
    config.buffer_mib = 1;
    config.disk_io_threads = 2;
    // The rings register memory on a thread that shuttle does not know.
    config.io_engine = EngineChoice::Posix;
    config.min_free = MinFree::Bytes(0);
    config.use_direct_io = Some(false);
    config.wait_limit_seconds = wait_limit_seconds;
    // What depends on the time of day cannot be run again.
    config.lookup_hold_seconds = 0.0;
    let options = OpenOptions {
        observer,
        ..OpenOptions::default()
    };
    let namespace = Namespace::new("model", serde_json::Map::new()).unwrap();
    let store = Store::open(&config, namespace, options).unwrap();
    let region = Region::zeroed(4 * PAGE_BYTES).unwrap();
    let layer = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: PAGE_BYTES,
        block_bytes: PAGE_BYTES,
    };
    let layout = KvLayout::new(vec![layer], 4, &[region.bytes()]).unwrap();
    let cache = store.attach(0, 0, layout, vec![region.clone()], 1).unwrap();
    (store, cache, region)
}

fn chunk(index: u8) -> ChunkRef {
    ChunkRef {
        key: ChunkKey::from_bytes(&[index; 32]).unwrap(),
        parent: None,
    }
}

fn storing(index: u8, block: usize) -> [StoreChunk; 1] {
    [StoreChunk {
        chunk: chunk(index),
        blocks: vec![block],
    }]
}

/// A chunk is stored; then it is loaded and looked up while another is stored, and store, KV cache
/// and tickets are dropped at any moment. Every ticket ends. What says that it was loaded holds
/// what was stored; what was looked up is there or was not answered in time.
#[test]
fn everything_is_dropped_in_flight() {
    let (_root, directories) = directories();
    explore(60, move || {
        let directory = tempfile::tempdir_in(&directories).unwrap();
        let (store, cache, region) = open(directory.path(), LONG.as_secs_f64(), None);
        region.copy_in(0, &[7; PAGE_BYTES]).unwrap();
        let first = cache.store(&storing(1, 0)).unwrap();
        assert_eq!(first.wait(LONG).unwrap().stored, 1);
        let load = LoadChunk {
            chunk: chunk(1),
            first_block: 0,
            blocks: vec![2],
        };
        let loaded = cache.load(vec![load]).unwrap();
        let found = store.lookup(0, &[0], vec![chunk(1).key]);
        let stored = cache.store(&storing(2, 0)).unwrap();
        let dropper = thread::spawn(move || drop(store));
        if thread_rng().gen_bool(0.5) {
            drop(stored);
        } else {
            let other = cache.clone();
            drop(cache);
            thread::spawn(move || drop(other));
            let report = stored.wait(LONG).unwrap();
            assert_eq!(report.stored + report.failed, 1);
        }
        let report = loaded.wait(LONG).unwrap();
        assert_eq!(report.loaded + report.failed.len(), 1);
        if report.loaded == 1 {
            let mut bytes = [0; PAGE_BYTES];
            region.copy_out(2 * PAGE_BYTES, &mut bytes).unwrap();
            assert_eq!(bytes, [7; PAGE_BYTES]);
        }
        assert!(found.wait(LONG).unwrap() <= 1);
        dropper.join().unwrap();
    });
}

/// The rename of a store hangs, and everything but its ticket is dropped: the watch goes on until
/// it has ended the store, so that the ticket is done.
#[test]
fn a_store_that_hangs_ends_after_everything_was_dropped() {
    // Above what a model may end by itself, so that opening has no limit.
    const LIMIT_SECONDS: f64 = 0.11;
    let (_root, directories) = directories();
    explore(5, move || {
        let directory = tempfile::tempdir_in(&directories).unwrap();
        let (release, held) = channel::bounded::<()>(1);
        let hang = Observer::new(move |step| {
            let is_chunk = |path: &Path| path.extension().is_some_and(|end| end == "safetensors");
            if matches!(step, Step::Rename { target, .. } if is_chunk(target)) {
                assert!((&held).next().is_none());
            }
        });
        let (store, cache, _) = open(directory.path(), LIMIT_SECONDS, Some(hang));
        let ticket = cache.store(&storing(1, 0)).unwrap();
        drop((store, cache));
        assert_eq!(ticket.wait(LONG).unwrap().failed, 1);
        drop(release);
    });
}
