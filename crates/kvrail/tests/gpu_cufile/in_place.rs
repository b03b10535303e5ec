//! Blocks that cuFile reads and writes in place: who may have them when.

use super::*;

#[test]
fn blocks_that_cufile_has_not_let_go_of_are_not_given_back() {
    let mut bench = Bench::start();
    let kind = Kind::BlocksOutermost;
    bench.config.wait_limit_seconds = 0.6;
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
    let content = noise(5, cache.bytes());
    cache.write(&content);
    for name in 1..=3 {
        assert_eq!(cache.store(name, [0, 1]).stored, 1);
    }
    // Late, it returns: then POSIX reads the chunk again.
    bench
        .mocks
        .script_cufile("cuFileReadv nth=1 delay_ms=2000\ncuFileReadv nth=2 hang");
    let calls = bench.mocks.cufile_calls("cuFileReadv");
    let slow = cache.start_load(1, 0, &[4, 5]);
    wait_until("a read in place", || {
        bench.mocks.cufile_calls("cuFileReadv") > calls
    });
    let hung = cache.start_load(2, 0, &[6, 7]);
    assert_eq!(slow.wait(LIMIT).unwrap().loaded, 1);
    let found = cache.read();
    assert!(block(kind, &found, 4) == block(kind, &content, 0));
    assert!(block(kind, &found, 5) == block(kind, &content, 1));
    // For ever: the load does not end, as its blocks may still be written to. Others go on.
    assert_eq!(cache.load(3, 0, &[8, 9]).loaded, 1);
    assert!(
        hung.wait(Duration::from_millis(1500)).is_err(),
        "ended while cuFile has the blocks"
    );
    assert_eq!(store.metrics().cufile_mounts_downgraded, 1);
    let closed = Instant::now();
    drop(cache);
    store.close(LIMIT).unwrap();
    assert!(
        closed.elapsed() < Duration::from_secs(5),
        "closing waited for the call that hangs"
    );
}

#[test]
fn blocks_are_read_in_place_while_their_head_is() {
    let bench = Bench::start();
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let kind = Kind::BlocksOutermost;
    let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
    let content = noise(5, cache.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [0, 1]).stored, 1);
    let delay = Duration::from_secs(3);
    bench
        .mocks
        .script_cufile("cuFileRead every=1 delay_ms=3000");
    let calls = bench.mocks.cufile_calls("cuFileReadv");
    let began = Instant::now();
    let ticket = cache.start_load(1, 0, &[4, 5]);
    wait_until("a read in place", || {
        bench.mocks.cufile_calls("cuFileReadv") > calls
    });
    assert!(began.elapsed() < delay, "only when the head was there");
    assert_eq!(ticket.wait(LIMIT).unwrap().loaded, 1);
    assert!(began.elapsed() >= delay, "before the head was there");
    let found = cache.read();
    assert!(block(kind, &found, 4) == block(kind, &content, 0));
    assert!(block(kind, &found, 5) == block(kind, &content, 1));
}

#[test]
fn as_many_stores_are_on_their_way_in_place_as_the_buffer_size_says() {
    const CHUNKS: u64 = 90;
    let mut bench = Bench::start();
    // 149 chunk files of 55 KiB each, of which a quarter is left to loads.
    bench.config.buffer_mib = 8;
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(&bench, &store, 0, Kind::BlocksOutermost).unwrap();
    cache.write(&noise(5, cache.bytes()));
    let blocks = |name: u64| [name, name + 1].map(|block| block as usize % gpu_cache::BLOCKS);
    let report = cache.store_step(&bench, (0..CHUNKS).map(|name| (name, blocks(name))));
    assert_eq!(report.stored, CHUNKS as usize, "{report:?}");
    assert_eq!(store.metrics().cufile_chunks_stored, CHUNKS);
}

#[test]
fn a_load_with_a_bad_head_ends_after_cufile_has_let_go_of_its_blocks() {
    let bench = Bench::start();
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(&bench, &store, 0, Kind::BlocksOutermost).unwrap();
    cache.write(&noise(5, cache.bytes()));
    assert_eq!(cache.store(1, [0, 1]).stored, 1);
    let path = chunk_path(folder.path(), 0, 1);
    let mut file = std::fs::read(&path).unwrap();
    file[40] ^= 1;
    std::fs::write(&path, file).unwrap();
    // Head and page table are read by `cuFileRead`, and are there long before.
    let delay = Duration::from_millis(700);
    bench.mocks.script_cufile("cuFileReadv nth=1 delay_ms=700");
    let began = Instant::now();
    let report = cache.load(1, 0, &[4, 5]);
    assert_eq!((report.loaded, report.failed), (0, vec![0]));
    assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
    assert_eq!(bench.mocks.cufile_calls("cuFileReadv"), 1);
    assert!(!path.exists(), "a bad chunk goes to quarantine");
}

#[test]
fn blocks_that_change_while_they_are_written_in_place_are_not_published() {
    let bench = Bench::start();
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(&bench, &store, 0, Kind::BlocksOutermost).unwrap();
    let content = noise(5, cache.bytes());
    cache.write(&content);
    let compute = cache.context.stream(Priority::Low).unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    for (script, name) in [
        // Before cuFile reads them, and before POSIX reads them instead of it.
        ("cuFileHandleRegister delay_ms=500", 1),
        (
            "cuFileHandleRegister delay_ms=500\ncuFileWritev error=5030",
            2,
        ),
    ] {
        cache.write(&content);
        bench.mocks.script_cufile(script);
        let wanted = StoreChunk {
            chunk: chunk(name),
            blocks: vec![3, 4],
        };
        let ticket = cache.kv_cache.store_after(&[wanted], stream).unwrap();
        // The next forward, behind the store on the compute stream, writes to the blocks.
        let late = noise(99, content.len());
        // SAFETY: as long as the allocation; waited for here.
        unsafe { compute.copy_to_device(cache.address(), late.as_ptr(), late.len()) }.unwrap();
        compute.synchronize().unwrap();
        let report = ticket.wait(LIMIT).unwrap();
        assert_eq!((report.stored, report.dropped), (0, 1), "{script}");
        assert!(!chunk_path(folder.path(), 0, name).exists(), "{script}");
        assert_eq!(store.metrics().stores_dropped_blocks_reused, name);
    }
    bench.mocks.script_cufile("");
    cache.write(&content);
    assert_eq!(
        cache.store(1, [3, 4]).stored,
        1,
        "the chunk can be stored later"
    );
}

/// As in vLLM's sleep mode: a store is on its way when the blocks' memory goes.
#[test]
fn blocks_whose_memory_may_go_are_copied_before_and_never_touched_in_place() {
    for (direct, no_in_place, told) in [
        (Some(true), Some("the memory may go"), "the memory may go"),
        (None, Some("the memory may go"), "the memory may go"),
        (Some(false), None, "`extra_config.direct` is false"),
    ] {
        let mut bench = Bench::start();
        bench.config.direct = direct;
        bench.no_in_place = no_in_place.map(str::to_owned);
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let kind = Kind::BlocksOutermost;
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        let notices = store.take_notices();
        let told = format!("not read and written in place, but through VRAM slots: {told}");
        assert!(
            notices.iter().any(|notice| notice.message.contains(&told)),
            "{notices:?}"
        );
        let content = noise(5, cache.bytes());
        cache.write(&content);
        let compute = cache.context.stream(Priority::Low).unwrap();
        // SAFETY: the stream lives until the end of the test.
        let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
        bench
            .mocks
            .script_cufile("cuFileHandleRegister delay_ms=500");
        let wanted = StoreChunk {
            chunk: chunk(1),
            blocks: vec![3, 4],
        };
        let ticket = cache.kv_cache.store_after(&[wanted], stream).unwrap();
        compute.synchronize().unwrap();
        cache.write(&noise(99, content.len()));
        assert!(!chunk_path(folder.path(), 0, 1).exists(), "still to come");
        assert_eq!(ticket.wait(LIMIT).unwrap().stored, 1);
        assert_eq!(cache.load(1, 0, &[0, 1]).loaded, 1);
        let found = cache.read();
        assert!(block(kind, &found, 0) == block(kind, &content, 3));
        assert!(block(kind, &found, 1) == block(kind, &content, 4));
        assert_eq!(store.metrics().cufile_chunks_stored, 1);
        for function in ["cuFileReadv", "cuFileWritev"] {
            assert_eq!(bench.mocks.cufile_calls(function), 0, "{function}");
        }
    }
}

#[test]
fn a_load_in_place_comes_after_what_the_compute_stream_still_does_to_its_blocks() {
    let bench = Bench::start();
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let kind = Kind::BlocksOutermost;
    let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
    let content = noise(1, cache.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [0, 1]).stored, 1);
    let compute = cache.context.stream(Priority::Low).unwrap();
    let late = noise(99, content.len());
    // SAFETY: as long as the allocation; waited for below.
    unsafe { compute.copy_to_device(cache.address(), late.as_ptr(), late.len()) }.unwrap();
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    let wanted = LoadChunk {
        chunk: chunk(1),
        first_block: 0,
        blocks: vec![4, 5],
    };
    let ticket = cache.kv_cache.load_after(vec![wanted], stream).unwrap();
    assert_eq!(ticket.wait(LIMIT).unwrap().loaded, 1);
    compute.synchronize().unwrap();
    let found = cache.read();
    assert!(
        block(kind, &found, 4) == block(kind, &content, 0),
        "overwritten by the forward"
    );
    assert!(
        block(kind, &found, 5) == block(kind, &content, 1),
        "overwritten by the forward"
    );
}
