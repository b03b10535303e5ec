//! What fails on the way, and what is never noticed of it but a miss.

use super::*;

#[test]
fn a_driver_that_does_not_take_the_kernels_copies_by_itself() {
    let mocks = Mocks::load();
    mocks.script_cuda("cuModuleLoadData error=222");
    round_trip(&mocks);
    assert_eq!(mocks.cuda_calls("cuLaunchKernel"), 0);
    assert!(mocks.cuda_calls("cuMemcpyBatchAsync") > 2);
    mocks.script_cuda("cuModuleLoadData error=222\ncuMemcpyBatchAsync error=801");
    let before = mocks.cuda_calls("cuMemcpyDtoDAsync");
    round_trip(&mocks);
    assert!(mocks.cuda_calls("cuMemcpyDtoDAsync") > before);
}

#[test]
fn kernels_that_compute_something_else_are_found_out_at_the_start() {
    for nth in 1..=4 {
        let mocks = Mocks::load();
        // The launches of the check: copy, hash, gather with hashes, scatter with hashes.
        mocks.script_cuda(&format!("cuLaunchKernel nth={nth} flip"));
        let folder = tempfile::tempdir().unwrap();
        let store = open(&mocks, folder.path());
        let cache = Cache::attach(&mocks, &store, 0).unwrap();
        cache.write(&noise(3, cache.memory.bytes()));
        let launches = mocks.cuda_calls("cuLaunchKernel");
        assert_eq!(cache.store(1, [0, 1]).stored, 1);
        assert_eq!(cache.load(1, 0, &[4, 5]).loaded, 1);
        let found = cache.read();
        assert!(block(&found, 4) == block(&found, 0) && block(&found, 5) == block(&found, 1));
        assert_eq!(
            mocks.cuda_calls("cuLaunchKernel"),
            launches,
            "kernels were used all the same"
        );
    }
}

#[test]
fn a_bad_chunk_is_a_miss_and_no_byte_that_is_not_verified_reaches_a_block() {
    let mocks = Mocks::load();
    for method in CopyMethod::ALL {
        load_bad_chunks(&mocks, method);
    }
}

fn load_bad_chunks(mocks: &Mocks, method: CopyMethod) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_by(mocks, folder.path(), Some(method));
    let cache = Cache::attach(mocks, &store, 0).unwrap();
    // In the head, in a page, in another one, in the page table; and the page, if it is one.
    let flips = [
        (100, None),
        (4096, Some(0)),
        (20_000, Some(3)),
        (38_000, None),
    ];
    for (name, (at, bad_page)) in (1..).zip(flips) {
        cache.write(&noise(name, cache.memory.bytes()));
        assert_eq!(cache.store(name, [0, 1]).stored, 1);
        let path = chunk_path(folder.path(), 0, name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 32;
        std::fs::write(&path, bytes).unwrap();
        let before = cache.read();
        let report = cache.load(name, 0, &[6, 7]);
        assert_eq!(report.failed, [0], "a flipped bit at {at}");
        assert!(!path.exists(), "the bad file was not set aside");
        let after = cache.read();
        for other in (0..GEOMETRY.blocks).filter(|other| ![6, 7].contains(other)) {
            assert!(
                block(&after, other) == block(&before, other),
                "block {other}"
            );
        }
        let payload =
            |memory: &[u8], blocks: [usize; 2]| blocks.map(|one| block(memory, one)).concat();
        let (was, is) = (payload(&before, [6, 7]), payload(&after, [6, 7]));
        let (CopyMethod::HashingKernel, Some(bad_page)) = (method, bad_page) else {
            assert!(is == was, "{method}: written by a bad chunk, bit at {at}");
            continue;
        };
        // A page is written if it is right, or it is not; of the bad one nothing is.
        let stored = payload(&before, [0, 1]);
        for (page, bytes) in is.chunks(4096).enumerate() {
            let range = page * 4096..page * 4096 + bytes.len();
            let is_verified = page != bad_page && *bytes == stored[range.clone()];
            assert!(
                is_verified || *bytes == was[range],
                "page {page}, bit at {at}"
            );
        }
    }
    assert_eq!(store.metrics().chunks_damaged, 4);
}

#[test]
fn any_call_of_the_driver_may_fail_at_any_time() {
    let functions = [
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuLaunchKernel",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuStreamWaitEvent",
        "cuCtxPushCurrent",
    ];
    let faults = ["error=700", "delay_ms=20"];
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let (mut name, mut missed) = (100, 0);
    for function in functions {
        for fault in faults {
            for nth in 1..=6 {
                name += 1;
                let content = noise(name, cache.memory.bytes());
                cache.write(&content);
                mocks.script_cuda(&format!("{function} nth={nth} {fault}"));
                let stored = cache.store(name, [0, 1]);
                let Ok(report) = cache.try_load(name, 0, &[8, 9]) else {
                    mocks.script_cuda("");
                    missed += 1;
                    continue;
                };
                mocks.script_cuda("");
                let what = format!("{function} nth={nth} {fault}: {stored:?} {report:?}");
                let found = cache.read();
                if report.loaded == 1 {
                    assert!(block(&found, 8) == block(&content, 0), "{what}");
                    assert!(block(&found, 9) == block(&content, 1), "{what}");
                } else {
                    missed += 1;
                }
            }
        }
    }
    assert!(missed > 20, "only {missed} faults were met");
    // Nothing is used up: buffers and slots are all there.
    for name in 1..=8 {
        assert_eq!(cache.store(name, [2, 3]).stored, 1);
        assert_eq!(cache.load(name, 0, &[4, 5]).loaded, 1);
    }
}

#[test]
fn bytes_that_change_on_their_way_over_pcie_are_found_out() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    cache.write(&noise(1, cache.memory.bytes()));
    mocks.script_cuda("cuMemcpyDtoHAsync nth=1 flip");
    assert_eq!(cache.store(1, [0, 1]).stored, 1);
    mocks.script_cuda("");
    assert_eq!(
        cache.load(1, 0, &[4, 5]).failed,
        [0],
        "flipped while it was stored"
    );
    assert_eq!(cache.store(2, [0, 1]).stored, 1);
    mocks.script_cuda("cuMemcpyHtoDAsync nth=1 flip");
    assert_eq!(
        cache.load(2, 0, &[4, 5]).failed,
        [0],
        "flipped while it was loaded"
    );
}

#[test]
fn what_cannot_work_is_an_error_when_the_cache_is_attached() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let context = context(&mocks, 1);
    // Enough for the KV cache of the test, and for nothing else.
    let free = context.memory_info().unwrap().0;
    let hog = context.allocate(free - layout().1 - (40 << 10)).unwrap();
    let error = Cache::attach(&mocks, &store, 1).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Gpu);
    assert!(error.to_string().contains("out of memory") || error.to_string().contains("are free"));
    drop(hog);
    // The KV cache of the test, twelve for the check of the kernels, two each for the two other ways
    // of copying; then 25, 12, 6, 3 slots and one.
    let refused = |nth| format!("cuMemAlloc nth={nth} error=2");
    mocks.script_cuda(&(18..=22).map(refused).collect::<Vec<_>>().join("\n"));
    let error = Cache::attach(&mocks, &store, 0).err().unwrap().to_string();
    for word in [
        "cufile_buffer_size",
        "MiB are free",
        "--gpu-memory-utilization",
        "cuda:0",
    ] {
        assert!(error.contains(word), "{error}");
    }
    let nowhere = OpenOptions {
        libraries: LibraryPaths {
            cuda: vec!["libkvrail-no-cuda.so.1".into()],
            ..LibraryPaths::default()
        },
        ..OpenOptions::default()
    };
    mocks.script_cuda("");
    let store = Store::open(&config(folder.path()), namespace(), nowhere).unwrap();
    let error = Cache::attach(&mocks, &store, 0).err().unwrap().to_string();
    assert!(error.contains("libkvrail-no-cuda.so.1"), "{error}");
    let store = open(&mocks, folder.path());
    let error = Cache::attach(&mocks, &store, 0).map(|cache| {
        let host = Region::zeroed(64).unwrap();
        let (layout, bytes) = layout();
        // SAFETY: the allocation has these bytes.
        let device = unsafe {
            Region::from_raw(
                cache.memory.address() as usize,
                bytes,
                Device::Cuda(0),
                Arc::clone(&cache.memory) as _,
            )
        }
        .unwrap();
        store
            .attach(0, 0, layout, vec![device, host], 2)
            .unwrap_err()
    });
    assert_eq!(error.unwrap().to_string(), "a KV cache on cuda:0 and cpu");
}
