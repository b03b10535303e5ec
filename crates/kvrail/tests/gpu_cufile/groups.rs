//! Several KV cache groups in one memory, as vLLM has them for models with windows or states.

use std::ops::Range;

use super::*;

/// The ways of a chunk, with the kind of KV cache that takes them.
const WAYS: [(Kind, bool, Route); 3] = [
    (Kind::LayersOutermost, false, Route::Posix),
    (Kind::LayersOutermost, true, Route::Slot),
    (Kind::BlocksOutermost, true, Route::InPlace),
];

/// Stores a chunk of each KV cache in one step, a few times, and loads all of them.
fn exchange(kind: Kind, names: Range<u64>, groups: [(&Cache, usize); 2]) {
    let [(first, _), _] = groups;
    let content = noise(5, first.bytes());
    first.write(&content);
    for name in names.clone() {
        for (cache, blocks) in groups {
            let chosen: Vec<usize> = (0..blocks).map(|at| name as usize + at).collect();
            let report = cache.store(name, chosen);
            assert_eq!(report.stored, 1, "{kind:?} {name}: {report:?}");
        }
    }
    for name in names {
        for (cache, blocks) in groups {
            first.write(&vec![0xA5; content.len()]);
            let targets: Vec<usize> = (8..8 + blocks).collect();
            assert_eq!(cache.load(name, 0, &targets).loaded, 1, "{kind:?} {name}");
            let found = first.read();
            for at in 0..blocks {
                assert!(
                    block(kind, &found, 8 + at) == block(kind, &content, name as usize + at),
                    "{kind:?}: chunk {name}, block {at}"
                );
            }
        }
    }
}

#[test]
fn groups_share_slots_and_what_cufile_knows_of_their_memory() {
    for (kind, use_cufile, route) in WAYS {
        let mut bench = Bench::start();
        bench.config.use_cufile = use_cufile;
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let first = Cache::attach(&bench, &store, 0, kind).unwrap();
        let (free, _) = first.context.memory_info().unwrap();
        // Chunks of a window, smaller than those of the first group.
        let second = first.attach_group(&store, kind, 1, 1);
        let (left, _) = first.context.memory_info().unwrap();
        // Heads and page tables are each group's own.
        let own = match route {
            Route::InPlace => 2 << 20,
            _ => 0,
        };
        assert!(free - left <= own, "{route:?}: {} for a group", free - left);
        for cache in [&first, &second] {
            let routes: Vec<Route> = cache.kv_cache.routes().into_iter().collect();
            assert_eq!(routes, [route]);
        }
        exchange(kind, 0..6, [(&first, 2), (&second, 1)]);
        // The one that brought the memory goes; the other one still has it.
        drop(first);
        let third = second.attach_group(&store, kind, 2, 1);
        exchange(kind, 6..8, [(&second, 1), (&third, 1)]);
        drop((second, third, store));
        bench.assert_balance();
    }
}

#[test]
fn no_group_s_stores_in_place_take_what_the_others_need() {
    // 64 chunks are on their way at most, of which a quarter is left to loads.
    const CHUNKS: u64 = 40;
    let mut bench = Bench::start();
    bench.config.buffer_mib = 1;
    let kind = Kind::BlocksOutermost;
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let first = Cache::attach(&bench, &store, 0, kind).unwrap();
    let second = first.attach_group(&store, kind, 1, 2);
    first.write(&noise(5, first.bytes()));
    let wanted = |name: u64| StoreChunk {
        chunk: chunk(name),
        blocks: [name, name + 1]
            .map(|block| block as usize % gpu_cache::BLOCKS)
            .into(),
    };
    let step: Vec<StoreChunk> = (0..CHUNKS).map(wanted).collect();
    bench.mocks.script_cuda("cuEventQuery error=600");
    let tickets = [&first, &second].map(|cache| cache.kv_cache.store(&step).unwrap());
    bench.mocks.script_cuda("");
    for ticket in tickets {
        assert_eq!(ticket.wait(LIMIT).unwrap().stored, CHUNKS as usize);
    }
    assert_eq!(store.metrics().cufile_chunks_stored, 2 * CHUNKS);
}

#[test]
fn a_slot_that_one_group_gave_back_is_cut_for_the_other_while_the_gpu_works_on_it() {
    const CHUNKS: u64 = 16;
    let mut bench = Bench::start();
    bench.config.use_cufile = false;
    bench.config.buffer_mib = 1;
    let kind = Kind::LayersOutermost;
    let folder = bench.folder();
    let store = bench.open(folder.path());
    // What a device is checked with is allocated for its first KV cache only.
    drop(Cache::attach(&bench, &store, 0, kind).unwrap());
    // The first two are the KV cache, which begins a page; 25, 12 and 6 slots are too many, 3 fit.
    let refused: Vec<String> = (3..6)
        .map(|nth| format!("cuMemAlloc nth={nth} error=2"))
        .collect();
    bench.mocks.script_cuda(&refused.join("\n"));
    let first = Cache::attach(&bench, &store, 0, kind).unwrap();
    bench.mocks.script_cuda("");
    let second = first.attach_group(&store, kind, 1, 1);
    let content = noise(5, first.bytes());
    first.write(&content);
    let compute = first.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    bench.mocks.script_cuda("cuEventQuery error=600");
    let groups = [(&first, 2), (&second, 1)];
    let tickets: Vec<_> = (0..CHUNKS)
        .map(|name| {
            let (cache, blocks) = groups[name as usize % 2];
            let wanted = StoreChunk {
                chunk: chunk(name),
                blocks: (0..blocks).map(|at| (name as usize + at) % 10).collect(),
            };
            cache.kv_cache.store_after(&[wanted], stream).unwrap()
        })
        .collect();
    bench.mocks.script_cuda("");
    for ticket in tickets {
        assert_eq!(ticket.wait(LIMIT).unwrap().stored, 1);
    }
    assert_eq!(store.metrics().stores_waited_for_slot, CHUNKS - 2);
    for name in 0..CHUNKS {
        let (cache, blocks) = groups[name as usize % 2];
        let targets: Vec<usize> = (10..10 + blocks).collect();
        assert_eq!(cache.load(name, 0, &targets).loaded, 1, "{name}");
        let found = first.read();
        for at in 0..blocks {
            let source = (name as usize + at) % 10;
            assert!(
                block(kind, &found, 10 + at) == block(kind, &content, source),
                "chunk {name}, block {at}"
            );
        }
    }
}
