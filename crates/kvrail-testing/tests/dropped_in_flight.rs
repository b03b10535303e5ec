//! Stores, KV caches, tickets and memory are dropped at random moments, by several threads, while an
//! engine delays, holds and fails what is in flight.
//!
//! The memory of each KV cache is an allocation that goes with its last owner, so that under
//! AddressSanitizer (`scripts/sanitize`) any access after that is an error; without it the test
//! shows that every ticket ends, that what was loaded is right, and that nothing is kept for ever.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that meets an error has failed"
)]

#[path = "../../kvrail/tests/common/mod.rs"]
mod store;

use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kvrail::{
    Device, KvCache, KvLayout, LayerSpan, LoadChunk, LoadTicket, LookupTicket, Region, Store,
    StoreChunk, StoreTicket,
};
use kvrail_testing::{FaultEngine, Random, fresh_seed};
use store::{LIMIT, chunk, config, key, open_with};

const THREADS: u64 = 4;
const ROUNDS: u64 = 12;
const OPERATIONS: u64 = 24;
/// Not a multiple of the page, so that chunks are padded.
const BLOCK_BYTES: usize = 5000;
/// One for each operation of a round: no two loads or stores ever share one.
const BLOCKS: usize = OPERATIONS as usize;
/// Chunks that the threads share.
const CHUNKS: u64 = 100;
/// What is in flight is late, damaged or lost. Only chunks are: a store must open.
const FAULTS: &str = "read,write * delay=2ms probability=0.3
    read,write * delay=40ms probability=0.05
    read *.safetensors error=EIO probability=0.02
    write */tmp/.chunk* short probability=0.02
    read *.safetensors flip probability=0.02";

/// Memory of a KV cache. Atomic bytes, since the store's threads write them while others look.
type Memory = Vec<AtomicU8>;

/// What a round holds, until it drops it.
#[expect(dead_code, reason = "some are held only to be dropped")]
enum Held {
    Store(Store),
    Cache(KvCache),
    Memory(Arc<Memory>),
    Loading(LoadTicket, usize, u64),
    Storing(StoreTicket),
    LookingUp(LookupTicket),
}

/// What was seen by all threads.
#[derive(Debug, Default)]
struct Seen {
    loaded: AtomicUsize,
    failed: AtomicUsize,
    stored: AtomicUsize,
    dropped_in_flight: AtomicUsize,
}

fn content(index: u64) -> u8 {
    (index * 37 + 11) as u8
}

#[expect(unsafe_code, reason = "a region of memory that the test allocates")]
fn region(memory: &Arc<Memory>) -> Region {
    let address = memory.as_ptr().expose_provenance();
    let owner: Arc<Memory> = Arc::clone(memory);
    // SAFETY: the owner keeps the bytes, they are atomic, and each block belongs to one operation.
    unsafe { Region::from_raw(address, memory.len(), Device::Host, owner) }.unwrap()
}

/// One round: opens a store, starts operations, drops what it holds in any order.
fn round(path: &Path, engine: &Arc<FaultEngine>, random: &mut Random, seen: &Seen) -> Weak<Memory> {
    let mut config = config(path);
    config.disk_io_threads = 2;
    config.use_direct_io = Some(false);
    let store = open_with(&config, Arc::<FaultEngine>::clone(engine));
    let memory: Arc<Memory> = Arc::new(
        (0..BLOCKS * BLOCK_BYTES)
            .map(|_| AtomicU8::new(0))
            .collect(),
    );
    let region = region(&memory);
    let layer = LayerSpan {
        region: 0,
        offset: 0,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    let layout = KvLayout::new(vec![layer], BLOCKS, &[region.bytes()]).unwrap();
    let cache = store.attach(0, 0, layout, vec![region], 1).unwrap();
    let weak = Arc::downgrade(&memory);
    // Operations use clones: the handles that are held may go at any time, and end nothing.
    let (for_operations, for_lookups) = (cache.clone(), store.clone());
    let mut held = vec![Held::Store(store), Held::Cache(cache)];
    for operation in 0..OPERATIONS as usize {
        let index = random.below(CHUNKS);
        match random.below(5) {
            0 => held.push(Held::LookingUp(for_lookups.lookup(
                0,
                &[0],
                vec![key(index)],
            ))),
            1 | 2 => {
                for byte in &memory[operation * BLOCK_BYTES..(operation + 1) * BLOCK_BYTES] {
                    byte.store(content(index), Ordering::Relaxed);
                }
                let stored = StoreChunk {
                    chunk: chunk(index),
                    blocks: vec![operation],
                };
                held.push(Held::Storing(for_operations.store(&[stored]).unwrap()));
            }
            _ => {
                let loaded = LoadChunk {
                    chunk: chunk(index),
                    first_block: 0,
                    blocks: vec![operation],
                };
                let ticket = for_operations.load(vec![loaded]).unwrap();
                held.push(Held::Loading(ticket, operation, index));
            }
        }
        if random.chance(0.4) {
            let which = random.below(held.len() as u64) as usize;
            let wait = random.chance(0.5);
            let_go(held.swap_remove(which), wait.then_some(&memory), seen);
        }
    }
    drop((for_operations, for_lookups));
    held.push(Held::Memory(Arc::clone(&memory)));
    // Half of the rounds look at the memory to the end, in the others it goes with the rest.
    let memory = random.chance(0.5).then_some(memory);
    while !held.is_empty() {
        let which = random.below(held.len() as u64) as usize;
        let wait = memory.as_ref().filter(|_| random.chance(0.5));
        let_go(held.swap_remove(which), wait, seen);
        if random.chance(0.2) {
            thread::sleep(Duration::from_millis(random.below(4)));
        }
    }
    weak
}

/// Drops something; a ticket first ends and is checked, if there is memory to look at.
fn let_go(held: Held, memory: Option<&Arc<Memory>>, seen: &Seen) {
    let Some(memory) = memory else {
        seen.dropped_in_flight.fetch_add(1, Ordering::Relaxed);
        return drop(held);
    };
    match held {
        Held::Loading(ticket, block, index) => {
            let report = ticket.wait(LIMIT).unwrap();
            assert_eq!(report.loaded + report.failed.len(), 1);
            seen.failed
                .fetch_add(report.failed.len(), Ordering::Relaxed);
            if report.loaded == 1 {
                let bytes = &memory[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES];
                let is_right = |byte: &AtomicU8| byte.load(Ordering::Relaxed) == content(index);
                assert!(bytes.iter().all(is_right), "chunk {index} is wrong");
                seen.loaded.fetch_add(1, Ordering::Relaxed);
            }
        }
        Held::Storing(ticket) => {
            let report = ticket.wait(LIMIT).unwrap();
            let ended = report.stored + report.already_present + report.dropped + report.failed;
            assert_eq!(ended, 1);
            seen.stored.fetch_add(report.stored, Ordering::Relaxed);
        }
        Held::LookingUp(ticket) => assert!(ticket.wait(LIMIT).unwrap() <= 1),
        other => drop(other),
    }
}

#[test]
fn whatever_is_dropped_in_flight_frees_nothing_and_ends_everything() {
    let seed = fresh_seed();
    println!("seed {seed}");
    let directory = tempfile::tempdir().unwrap();
    let engine = FaultEngine::new(seed);
    engine.set(FAULTS);
    let seen = Seen::default();
    let memories: Vec<Weak<Memory>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let (engine, seen, path) = (&engine, &seen, directory.path());
                scope.spawn(move || {
                    let mut random = Random::new(seed + number);
                    (0..ROUNDS)
                        .map(|_| round(path, engine, &mut random, seen))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.flatten().collect()
    });
    println!("{seen:?}, {} requests hit by a fault", engine.hits());
    assert!(seen.loaded.into_inner() > 20 && seen.stored.into_inner() > 10);
    assert!(seen.dropped_in_flight.into_inner() > 100 && engine.hits() > 50);
    // What was in flight lets go of its memory when it ends.
    let deadline = Instant::now() + LIMIT;
    for memory in memories {
        while memory.strong_count() > 0 {
            assert!(Instant::now() < deadline, "memory is kept for ever");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_load_that_is_held_ends_after_everything_but_its_ticket_was_dropped() {
    let seed = fresh_seed();
    let directory = tempfile::tempdir().unwrap();
    let engine = FaultEngine::new(seed);
    let mut config = config(directory.path());
    config.wait_limit_seconds = 0.5;
    config.disk_io_threads = 1;
    let store = open_with(&config, Arc::<FaultEngine>::clone(&engine));
    let cache = store::Cache::attach(&store, 0, store::Geometry::default());
    cache.fill(0, 1);
    cache.fill(1, 2);
    assert_eq!(cache.store(&[(1, vec![0, 1])]).stored, 1);
    engine.set("read *.safetensors hang");
    let load = LoadChunk {
        chunk: chunk(1),
        first_block: 0,
        blocks: vec![2, 3],
    };
    let ticket = cache.kv_cache.load(vec![load]).unwrap();
    while engine.hits() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let owner = cache.region.clone();
    drop((cache, store));
    let report = ticket.wait(LIMIT).unwrap();
    assert_eq!(report.failed, [0]);
    let mut before = vec![0; owner.bytes()];
    owner.copy_out(0, &mut before).unwrap();
    // The request goes on now, into a staging buffer; the blocks belong to somebody else.
    engine.set("");
    thread::sleep(Duration::from_millis(100));
    let mut after = vec![0; owner.bytes()];
    owner.copy_out(0, &mut after).unwrap();
    assert_eq!(before, after);
}
