//! More stores at once than there are VRAM slots.

use std::ops::Range;

use super::*;

/// Chunks of one step: more than the slots that are left, fewer than the staging buffers.
const CHUNKS: u64 = 16;

/// Attaches a KV cache on a GPU whose memory is enough for `slots` slots: 25 are tried, then 12, 6,
/// 3 and one.
fn attach_with(mocks: &Mocks, store: &Store, slots: usize) -> Cache {
    // What a device is checked with is allocated for its first KV cache only.
    drop(Cache::attach(mocks, store, 0).unwrap());
    store.take_notices();
    let tries = [25, 12, 6, 3, 1];
    let refused = tries.iter().take_while(|count| **count > slots).count();
    // The first is the KV cache.
    let script: Vec<String> = (2..2 + refused)
        .map(|nth| format!("cuMemAlloc nth={nth} error=2"))
        .collect();
    mocks.script_cuda(&script.join("\n"));
    let cache = Cache::attach(mocks, store, 0).unwrap();
    mocks.script_cuda("");
    let notices = store.take_notices();
    let told = format!(" {slots} VRAM slots");
    assert!(
        notices.iter().any(|notice| notice.message.contains(&told)),
        "{notices:?}"
    );
    cache
}

/// Stores all chunks in one call, as a step ends, while the GPU is through with nothing of it, and lets
/// the next forward overwrite the KV cache at once. Returns what the KV cache held before.
fn store_and_overwrite(
    mocks: &Mocks,

    cache: &Cache,
    script: &str,
    blocks_of: impl Fn(u64) -> [usize; 2],
) -> (Vec<u8>, StoreReport) {
    let content = noise(11, cache.memory.bytes());
    cache.write(&content);
    let chunks: Vec<StoreChunk> = (0..CHUNKS)
        .map(|name| StoreChunk {
            chunk: chunk(name),
            blocks: blocks_of(name).to_vec(),
        })
        .collect();
    let compute = cache.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until it was waited for.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    mocks.script_cuda(&format!("cuEventQuery error=600\n{script}"));
    let ticket = cache.kv_cache.store_after(&chunks, stream).unwrap();
    mocks.script_cuda("");
    let next = vec![POISON; content.len()];
    // SAFETY: as long as the allocation; waited for below.
    unsafe { compute.copy_to_device(cache.memory.address(), next.as_ptr(), next.len()) }.unwrap();
    let report = ticket.wait(LIMIT).unwrap();
    compute.synchronize().unwrap();
    (content, report)
}

#[test]
fn stores_of_one_step_pass_the_slots_one_behind_the_other_and_none_is_dropped() {
    let mocks = Mocks::load();
    let blocks_of = |name: u64| [name as usize, (name as usize + 5) % GEOMETRY.blocks];
    for own_pace in [false, true] {
        mocks.own_pace(own_pace);
        for method in CopyMethod::ALL {
            for slots in [1, 3] {
                let folder = tempfile::tempdir().unwrap();
                let store = open_by(&mocks, folder.path(), Some(method));
                let cache = attach_with(&mocks, &store, slots);
                let (content, report) = store_and_overwrite(&mocks, &cache, "", blocks_of);
                assert_eq!(
                    report.stored, CHUNKS as usize,
                    "{method}, {slots}: {report:?}"
                );
                let waited = store.metrics().stores_waited_for_slot;
                // One of several is left to loads.
                let free = if slots > 1 { slots as u64 - 1 } else { 1 };
                assert_eq!(waited, CHUNKS - free, "{method}, {slots}");
                for name in 0..CHUNKS {
                    assert_eq!(cache.load(name, 0, &[2, 3]).loaded, 1, "{method}, {name}");
                    let found = cache.read();
                    let [first, second] = blocks_of(name);
                    assert!(
                        block(&found, 2) == block(&content, first),
                        "{method}, {name}"
                    );
                    assert!(
                        block(&found, 3) == block(&content, second),
                        "{method}, {name}"
                    );
                }
            }
        }
    }
    mocks.own_pace(false);
}

#[test]
fn a_stream_that_cannot_wait_for_a_slot_costs_its_store_and_no_slot() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = attach_with(&mocks, &store, 1);
    // The first store orders its own stream behind the compute stream; the second begins by having
    // the compute stream wait for the slot.
    let refused = "cuStreamWaitEvent nth=2 error=700";
    let (_, report) = store_and_overwrite(&mocks, &cache, refused, |name| [name as usize, 0]);
    assert_eq!(
        (report.stored, report.failed),
        (CHUNKS as usize - 1, 1),
        "{report:?}"
    );
    for round in 0..3 {
        let name = 100 + round;
        assert_eq!(cache.store(name, [4, 5]).stored, 1, "round {round}");
    }
}

/// Chunks with these names, all of the same two blocks.
fn step_of(names: Range<u64>) -> Vec<StoreChunk> {
    names
        .map(|name| StoreChunk {
            chunk: chunk(name),
            blocks: vec![0, 1],
        })
        .collect()
}

#[test]
fn buffers_of_stores_that_end_before_their_copy_come_back() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let other = open(&mocks, folder.path());
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let theirs = Cache::attach(&mocks, &other, 1).unwrap();
    let content = noise(3, cache.memory.bytes());
    cache.write(&content);
    theirs.write(&content);
    for name in 0..CHUNKS {
        assert_eq!(theirs.store(name, [0, 1]).stored, 1);
    }
    let compute = cache.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    // A forward of seconds is in front of the copies; the chunks are there, so nobody waits for it.
    mocks.script_cuda("cuEventQuery error=600");
    let chunks = step_of(0..CHUNKS);
    let began = Instant::now();
    let ticket = cache.kv_cache.store_after(&chunks, stream).unwrap();
    let report = ticket.wait(LIMIT).unwrap();
    assert_eq!(report.already_present, CHUNKS as usize, "{report:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "waited for a GPU");
    // Their buffers are not used again meanwhile.
    let next = step_of(CHUNKS..2 * CHUNKS);
    let ticket = cache.kv_cache.store_after(&next, stream).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    mocks.script_cuda("");
    let report = ticket.wait(LIMIT).unwrap();
    assert!(
        report.dropped > 0,
        "buffers that a GPU writes to: {report:?}"
    );
    let deadline = Instant::now() + LIMIT;
    for name in 2 * CHUNKS.. {
        let chunks = step_of(name * CHUNKS..(name + 1) * CHUNKS);
        let report = cache.kv_cache.store_after(&chunks, stream).unwrap();
        if report.wait(LIMIT).unwrap().stored == CHUNKS as usize {
            break;
        }
        assert!(Instant::now() < deadline, "buffers were lost");
    }
}

#[test]
fn loads_do_not_wait_for_the_forward_that_stores_wait_for() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let compute = cache.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    let chunks = step_of(0..CHUNKS);
    // More stores than threads, behind a forward that does not end.
    mocks.script_cuda("cuEventQuery error=600");
    let stores = cache.kv_cache.store_after(&chunks, stream).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    // Chunks that are not there: all that their loads need is a thread.
    for name in 100..108 {
        let began = Instant::now();
        let report = cache.load(name, 0, &[4, 5]);
        assert_eq!(report.failed, vec![0]);
        assert!(began.elapsed() < Duration::from_secs(1), "{began:?}");
    }
    assert_eq!(
        store.metrics().chunks_stored,
        0,
        "the GPU was not there yet"
    );
    mocks.script_cuda("");
    assert_eq!(stores.wait(LIMIT).unwrap().stored, CHUNKS as usize);
}

#[test]
fn a_forward_that_takes_long_is_not_held_against_the_path() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.slow_limit_seconds = 0.3;
    let store = Store::open(&config, namespace(), options(&mocks)).unwrap();
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let compute = cache.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    // One for each thread: as many in a row as take a slow path out of use.
    let chunks = step_of(0..4);
    mocks.script_cuda("cuEventQuery error=600");
    let stores = cache.kv_cache.store_after(&chunks, stream).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    mocks.script_cuda("");
    assert_eq!(stores.wait(LIMIT).unwrap().stored, 4);
    assert_eq!(store.metrics().paths_taken_out, 0);
    assert_eq!(cache.load(1, 0, &[4, 5]).loaded, 1);
}
