//! KV cache in the memory of a GPU by cuFile, on mocks: through VRAM slots and in place, and what
//! becomes of every failure: POSIX, with the bytes right.
#![expect(unsafe_code, reason = "makes regions of the mock's device memory")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;
#[path = "common/gpu_cache.rs"]
mod gpu_cache;
#[path = "common/machine.rs"]
mod machine;

use std::time::{Duration, Instant};

use common::{LIMIT, chunk, chunk_path, noise};
use gpu_cache::{Bench, Cache, Kind, block};
use kvrail::{ComputeStream, LoadChunk, StoreChunk};
use kvrail_cuda::Priority;

const KINDS: [Kind; 2] = [Kind::LayersOutermost, Kind::BlocksOutermost];

/// Not a test: the program that tries cuFile, which the store starts.
#[test]
#[ignore = "started by the other tests as a program of its own"]
fn probe_program() {
    kvrail_cuda::probe::answer(std::io::stdin(), &mut std::io::stdout());
}

fn round_trip(bench: &Bench, kind: Kind) {
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let source = Cache::attach(bench, &store, 0, kind).unwrap();
    let content = noise(7, source.bytes());
    source.write(&content);
    assert_eq!(source.store(1, [5, 2]).stored, 1);
    let host = bench.folder();
    gpu_cache::store_from_host(host.path(), kind, &content, 1, [5, 2]);
    let files = [&folder, &host].map(|folder| std::fs::read(chunk_path(folder.path(), 0, 1)));
    let [gpu_file, host_file] = files.map(Result::unwrap);
    assert!(
        gpu_file == host_file,
        "{kind:?}: another file than the host's path"
    );
    // Whole, and only the second block, on another GPU; nothing else is touched.
    let other = bench.open(folder.path());
    let target = Cache::attach(bench, &other, 1, kind).unwrap();
    assert_eq!(target.load(1, 0, &[0, 9]).loaded, 1);
    assert_eq!(target.load(1, 1, &[12]).loaded, 1);
    let found = target.read();
    for (at, from) in [(0, 5), (9, 2), (12, 2)] {
        assert!(
            block(kind, &found, at) == block(kind, &content, from),
            "{kind:?}: block {at}"
        );
    }
    for other in [1, 3, 8, 10, 11, 13] {
        assert!(
            gpu_cache::is_untouched(kind, &found, other),
            "{kind:?}: block {other}"
        );
    }
    assert_eq!(store.metrics().cufile_chunks_stored, 1, "{kind:?}");
    assert_eq!(other.metrics().cufile_chunks_loaded, 2, "{kind:?}");
}

#[test]
fn chunks_go_from_one_gpu_to_a_file_to_another_by_cufile_and_everything_is_given_back() {
    let bench = Bench::start();
    for kind in KINDS {
        round_trip(&bench, kind);
    }
    assert!(
        bench.mocks.cufile_calls("cuFileWritev") > 0,
        "blocks were not written in place"
    );
    assert!(
        bench.mocks.cufile_calls("cuFileReadv") > 0,
        "blocks were not read in place"
    );
    bench.assert_balance();
}

#[test]
fn a_library_that_does_not_take_many_pieces_at_once_moves_each() {
    let bench = Bench::start();
    bench
        .mocks
        .script_cufile("cuFileReadv error=5008\ncuFileWritev error=5008");
    round_trip(&bench, Kind::BlocksOutermost);
    bench.assert_balance();
}

#[test]
fn the_store_says_which_way_the_bytes_go() {
    let bench = Bench::start();
    for (kind, words) in [
        (Kind::LayersOutermost, "a block lies in 3 pieces"),
        (Kind::BlocksOutermost, "blocks read and written in place"),
    ] {
        let folder = bench.folder();
        let store = bench.open(folder.path());
        drop(Cache::attach(&bench, &store, 0, kind).unwrap());
        let notices: Vec<String> = store
            .take_notices()
            .into_iter()
            .map(|notice| notice.message)
            .collect();
        assert!(
            notices.iter().any(|line| line.contains(words)),
            "{notices:?}"
        );
        let verified = "cuFile moves the bytes: verified by write, read and compare";
        assert!(
            notices.iter().any(|line| line.contains(verified)),
            "{notices:?}"
        );
        assert_eq!(store.describe()[0].engine, "cufile");
    }
}

/// Attaches on what `change` made of the machine or the mocks; the bytes must come and go by POSIX,
/// with this reason.
fn assert_posix(bench: &Bench, kind: Kind, reason: &str) {
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let cache = Cache::attach(bench, &store, 0, kind).unwrap();
    bench.mocks.script_cufile("");
    let report = store.describe().remove(0);
    assert_eq!(report.engine, "posix", "{reason}");
    assert!(report.reason.contains(reason), "{}", report.reason);
    let lines = store.take_notices();
    let lines: Vec<_> = lines
        .iter()
        .filter(|notice| notice.message.contains(reason))
        .collect();
    assert_eq!(lines.len(), 1, "{reason}: {lines:?}");
    let content = noise(3, cache.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [4, 7]).stored, 1, "{reason}");
    assert_eq!(cache.load(1, 0, &[0, 1]).loaded, 1, "{reason}");
    let found = cache.read();
    assert!(
        block(kind, &found, 0) == block(kind, &content, 4),
        "{reason}"
    );
    assert!(
        block(kind, &found, 1) == block(kind, &content, 7),
        "{reason}"
    );
    assert_eq!(store.metrics().cufile_chunks_stored, 0);
}

#[test]
fn a_machine_where_cufile_must_not_be_touched_uses_posix() {
    type Change = fn(&mut Bench);
    let changes: [(&str, Change); 9] = [
        ("no /proc/modules", |bench| {
            bench.machine.without("proc/modules")
        }),
        ("/dev/nvidia-fs0 is not", |bench| {
            bench.machine.without("dev/nvidia-fs0")
        }),
        ("neither nvidia-fs nor P2PDMA", |bench| {
            bench.machine.without("proc/driver/nvidia-fs");
        }),
        ("running in a container?", |bench| {
            bench.machine.without("run/udev/data/b259:2")
        }),
        ("overlay is a container's own", |bench| {
            bench
                .machine
                .mount("22 1 0:50 / / rw - overlay overlay rw\n");
        }),
        ("tmpfs has no device", |bench| {
            bench.machine.mount("22 1 0:50 / / rw - tmpfs tmpfs rw\n");
        }),
        ("libkvrail-no-cufile.so.0", |bench| {
            bench.libraries.cufile = vec!["libkvrail-no-cufile.so.0".into()];
        }),
        ("no program was named", |bench| bench.probe = None),
        ("/nonexistent/probe was not started", |bench| {
            bench.probe.as_mut().unwrap().program = "/nonexistent/probe".into();
        }),
    ];
    for (reason, change) in changes {
        let mut bench = Bench::start();
        change(&mut bench);
        assert_posix(&bench, Kind::LayersOutermost, reason);
        assert_eq!(bench.mocks.cufile_calls("cuFileDriverOpen"), 0, "{reason}");
    }
    let mut bench = Bench::start();
    bench.config.use_cufile = false;
    assert_posix(&bench, Kind::BlocksOutermost, "turned off by `use_cufile`");
}

#[test]
fn whatever_fails_in_the_process_that_tries_it_never_reaches_this_one() {
    for (script, reason) in [
        ("cuFileDriverOpen error=5033", "cuFileDriverOpen: 5033"),
        (
            "cuFileDriverOpen hang",
            "cuFileDriverOpen did not return within 0.5 s",
        ),
        ("cuFileBufRegister error=5036", "BAR1 full?"),
        (
            "cuFileHandleRegister error=5027",
            "no udev record for this mount",
        ),
        (
            "cuFileHandleRegister error=5030",
            "cuFileHandleRegister: 5030",
        ),
        ("cuFileWrite error=5030", "cuFileWrite: 5030"),
        ("cuFileWrite short=4096", "expected 1048576 bytes, got 4096"),
        ("cuFileRead error=5048", "cuFileRead: 5048"),
        ("cuFileRead short=8192", "expected 1048576 bytes, got 8192"),
        ("cuFileRead flip", "what was read is not what was written"),
        ("cuFileRead hang", "did not return within 0.5 s"),
    ] {
        let mut bench = Bench::start();
        bench.config.wait_limit_seconds = 0.5;
        if !script.ends_with("hang") {
            bench.config.wait_limit_seconds = 20.0;
        }
        // SAFETY: no other thread of this test reads the environment now.
        unsafe { std::env::set_var("KVRAIL_MOCK_CUFILE_SCRIPT", script) };
        let folder = bench.folder();
        let store = bench.open(folder.path());
        drop(Cache::attach(&bench, &store, 0, Kind::LayersOutermost).unwrap());
        let report = store.describe().remove(0);
        assert_eq!(report.engine, "posix", "{script}");
        assert!(
            report.reason.contains(reason),
            "{script}: {}",
            report.reason
        );
        assert_eq!(bench.mocks.cufile_calls("cuFileDriverOpen"), 0, "{script}");
        assert_eq!(
            gpu_cache::leftovers(folder.path()),
            0,
            "{script}: a file is left"
        );
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var("KVRAIL_MOCK_CUFILE_SCRIPT") };
}

#[test]
fn what_works_in_another_process_and_not_here_is_posix_too() {
    for (script, reason) in [
        ("cuFileDriverOpen error=5030", "cuFileDriverOpen: 5030"),
        (
            "cuFileDriverOpen hang",
            "cuFileDriverOpen did not return within",
        ),
        ("cuFileBufRegister error=5036", "BAR1 full?"),
        (
            "cuFileBufRegister hang",
            "cuFileBufRegister did not return within",
        ),
        (
            "cuFileHandleRegister error=5027",
            "no udev record for this mount",
        ),
        ("cuFileWrite error=5030", "cuFileWrite: 5030"),
        ("cuFileWrite short=0", "expected 4096 bytes, got 0"),
        ("cuFileRead error=5048", "cuFileRead: 5048"),
        ("cuFileRead flip", "what was read is not what was written"),
        ("cuFileRead hang", "did not answer in time"),
    ] {
        let mut bench = Bench::start();
        if script.ends_with("hang") {
            bench.config.wait_limit_seconds = 2.0;
        }
        bench.mocks.script_cufile(script);
        assert_posix(&bench, Kind::LayersOutermost, reason);
    }
}

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
    while bench.mocks.cufile_calls("cuFileReadv") == calls {
        std::thread::yield_now();
    }
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

#[test]
fn a_bad_chunk_is_a_miss_by_cufile_too_and_costs_it_nothing() {
    for kind in KINDS {
        let bench = Bench::start();
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        for name in 1..=6_u64 {
            cache.write(&noise(name, cache.bytes()));
            assert_eq!(cache.store(name, [0, 1]).stored, 1);
            let path = chunk_path(folder.path(), 0, name);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = [100, 4096, 20_000, 9000][name as usize % 4];
            bytes[at] ^= 32;
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(cache.load(name, 0, &[6, 7]).failed, [0], "{kind:?}");
            assert!(!path.exists(), "the bad file was not set aside");
        }
        let metrics = store.metrics();
        assert_eq!(
            (metrics.chunks_damaged, metrics.cufile_mounts_downgraded),
            (6, 0)
        );
        assert_eq!(store.describe()[0].engine, "cufile");
    }
}
