//! What fails while cuFile is in use: the bytes go by POSIX, and right.

use super::*;

#[test]
fn a_kv_cache_that_cannot_be_registered_goes_through_slots() {
    let bench = Bench::start();
    // The first registration is that of the KV cache, the second one that of the slots.
    bench
        .mocks
        .script_cufile("cuFileBufRegister nth=1 error=5036");
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(&bench, &store, 0, Kind::BlocksOutermost).unwrap();
    let notices = store.take_notices();
    let told = "not read and written in place, but through VRAM slots: register the KV cache";
    assert!(
        notices.iter().any(|notice| notice.message.contains(told)),
        "{notices:?}"
    );
    let content = noise(3, cache.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [4, 7]).stored, 1);
    assert_eq!(cache.load(1, 0, &[0, 1]).loaded, 1);
    let found = cache.read();
    assert!(block(Kind::BlocksOutermost, &found, 1) == block(Kind::BlocksOutermost, &content, 7));
    assert_eq!(bench.mocks.cufile_calls("cuFileWritev"), 0);
    assert_eq!(store.metrics().cufile_chunks_stored, 1);
}

#[test]
fn any_call_of_cufile_may_fail_at_any_time_and_the_bytes_are_right() {
    let faults = [
        "error=5030",
        "error=5048",
        "short=4096",
        "short=0",
        "flip",
        "delay_ms=10",
    ];
    for kind in KINDS {
        let functions: &[&str] = match kind {
            Kind::LayersOutermost => &["cuFileHandleRegister", "cuFileRead", "cuFileWrite"],
            Kind::BlocksOutermost => &[
                "cuFileHandleRegister",
                "cuFileRead",
                "cuFileWrite",
                "cuFileReadv",
                "cuFileWritev",
            ],
        };
        let bench = Bench::start();
        let mut fallbacks = 0;
        for function in functions {
            for fault in faults {
                let folder = bench.folder();
                let store = bench.open(folder.path());
                let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
                for nth in 1..=3 {
                    let content = noise(nth, cache.bytes());
                    cache.write(&content);
                    bench
                        .mocks
                        .script_cufile(&format!("{function} nth={nth} {fault}"));
                    let stored = cache.store(nth, [0, 1]);
                    let loaded = cache.load(nth, 0, &[8, 9]);
                    let again = cache.load(nth, 1, &[10]);
                    bench.mocks.script_cufile("");
                    let what = format!("{kind:?} {function} nth={nth} {fault}");
                    assert_eq!(stored.stored, 1, "{what}: {stored:?}");
                    assert_eq!(
                        (loaded.loaded, again.loaded),
                        (1, 1),
                        "{what}: {loaded:?} {again:?}"
                    );
                    let found = cache.read();
                    for (at, from) in [(8, 0), (9, 1), (10, 1)] {
                        let same = block(kind, &found, at) == block(kind, &content, from);
                        assert!(same, "{what}: block {at}");
                    }
                }
                fallbacks += store.metrics().cufile_fallbacks;
                assert_eq!(store.metrics().chunks_set_aside, 0, "{function} {fault}");
            }
        }
        assert!(fallbacks > 20, "{kind:?}: only {fallbacks} faults were met");
        bench.assert_balance();
    }
}

#[test]
fn a_path_that_is_left_to_posix_takes_as_many_stores_of_a_step_as_before() {
    // More than the staging buffers for what falls back, fewer than the VRAM slots.
    const CHUNKS: usize = 14;
    let bench = Bench::start();
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let kind = Kind::LayersOutermost;
    let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
    let content = noise(5, cache.bytes());
    cache.write(&content);
    let store_step = |first: usize| {
        let chunks = (0..CHUNKS).map(|number| ((first + number) as u64, [number, number + 1]));
        cache.store_step(&bench, chunks).stored
    };
    assert_eq!(store_step(100), CHUNKS, "by cuFile");
    bench.mocks.script_cufile("cuFileHandleRegister error=5030");
    for name in 1..=3 {
        assert_eq!(cache.store(name, [0, 1]).stored, 1);
    }
    let downgraded = store.metrics();
    assert_eq!(downgraded.cufile_mounts_downgraded, 1);
    assert_eq!(store_step(200), CHUNKS, "by POSIX");
    let metrics = store.metrics();
    assert_eq!(
        (metrics.cufile_chunks_stored, metrics.cufile_fallbacks),
        (CHUNKS as u64, downgraded.cufile_fallbacks),
        "nothing failed any more"
    );
    for number in [0, CHUNKS - 1] {
        let name = (200 + number) as u64;
        assert_eq!(cache.load(name, 0, &[14, 15]).loaded, 1);
        let found = cache.read();
        assert!(block(kind, &found, 14) == block(kind, &content, number));
        assert!(block(kind, &found, 15) == block(kind, &content, number + 1));
        cache.write(&content);
    }
}

#[test]
fn repeated_failures_leave_the_path_to_posix_and_everybody_can_see_it() {
    for kind in KINDS {
        let bench = Bench::start();
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        store.take_notices();
        bench.mocks.script_cufile("cuFileHandleRegister error=5030");
        for name in 1..=5 {
            assert_eq!(cache.store(name, [0, 1]).stored, 1);
        }
        let metrics = store.metrics();
        assert_eq!(
            (metrics.cufile_fallbacks, metrics.cufile_mounts_downgraded),
            (3, 1)
        );
        let report = store.describe().remove(0);
        assert_eq!(report.engine, "posix");
        assert!(
            report.reason.contains("3 failures in a row"),
            "{}",
            report.reason
        );
        let calls = bench.mocks.cufile_calls("cuFileHandleRegister");
        for name in 1..=5 {
            assert_eq!(cache.load(name, 0, &[2, 3]).loaded, 1);
        }
        assert_eq!(bench.mocks.cufile_calls("cuFileHandleRegister"), calls);
        let lines: Vec<String> = store
            .take_notices()
            .into_iter()
            .map(|notice| notice.message)
            .collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("POSIX did it instead"), "{lines:?}");
        assert!(
            lines[1].contains("POSIX moves the bytes from now on"),
            "{lines:?}"
        );
    }
}

#[test]
fn a_call_that_hangs_costs_half_of_the_limit_and_the_use_of_cufile() {
    for (kind, function) in [
        (Kind::LayersOutermost, "cuFileWrite"),
        (Kind::LayersOutermost, "cuFileRead"),
        (Kind::BlocksOutermost, "cuFileWrite"),
        (Kind::BlocksOutermost, "cuFileWritev"),
        (Kind::BlocksOutermost, "cuFileRead"),
    ] {
        let mut bench = Bench::start();
        bench.config.wait_limit_seconds = 3.0;
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        let content = noise(5, cache.bytes());
        cache.write(&content);
        let start = Instant::now();
        bench.mocks.script_cufile(&format!("{function} nth=1 hang"));
        assert_eq!(cache.store(1, [0, 1]).stored, 1, "{kind:?} {function}");
        assert_eq!(cache.load(1, 0, &[8, 9]).loaded, 1, "{kind:?} {function}");
        assert!(
            start.elapsed() < Duration::from_secs(6),
            "{kind:?} {function}"
        );
        let found = cache.read();
        for (at, from) in [(8, 0), (9, 1)] {
            assert!(
                block(kind, &found, at) == block(kind, &content, from),
                "{kind:?} {function}"
            );
        }
        let metrics = store.metrics();
        assert_eq!(metrics.cufile_mounts_downgraded, 1, "{kind:?} {function}");
        // Nothing is used up but what hangs.
        for name in 2..=9 {
            assert_eq!(cache.store(name, [2, 3]).stored, 1);
            assert_eq!(cache.load(name, 0, &[4, 5]).loaded, 1);
        }
    }
}

#[test]
fn a_gpu_that_comes_late_is_not_held_against_cufile() {
    for kind in KINDS {
        let mut bench = Bench::start();
        bench.config.wait_limit_seconds = 2.0;
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        let content = noise(3, cache.bytes());
        cache.write(&content);
        let compute = cache.context.stream(Priority::Low).unwrap();
        // SAFETY: the stream lives until the end of the test.
        let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
        let wanted = StoreChunk {
            chunk: chunk(1),
            blocks: vec![4, 7],
        };
        // A forward that takes longer than a store waits for it, two limits, and than cuFile's half of
        // one after that.
        bench.mocks.script_cuda("cuEventQuery error=600");
        let ticket = cache.kv_cache.store_after(&[wanted], stream).unwrap();
        std::thread::sleep(Duration::from_millis(5500));
        bench.mocks.script_cuda("");
        assert_eq!(ticket.wait(LIMIT).unwrap().stored, 1, "{kind:?}");
        let metrics = store.metrics();
        let counted = (
            metrics.cufile_chunks_stored,
            metrics.cufile_fallbacks,
            metrics.cufile_mounts_downgraded,
        );
        assert_eq!(counted, (0, 1, 0), "{kind:?}");
        assert_eq!(metrics.paths_taken_out, 0, "the file system answered");
        let notices = store.take_notices();
        assert!(
            notices
                .iter()
                .any(|notice| notice.message.contains("the GPU came too late for cuFile")),
            "{notices:?}"
        );
        assert_eq!(cache.store(2, [0, 1]).stored, 1, "{kind:?}");
        assert_eq!(cache.load(1, 0, &[8, 9]).loaded, 1, "{kind:?}");
        assert_eq!(store.metrics().cufile_chunks_stored, 1, "{kind:?}");
        assert_eq!(store.metrics().cufile_chunks_loaded, 1, "{kind:?}");
        assert!(block(kind, &cache.read(), 9) == block(kind, &content, 7));
    }
}
