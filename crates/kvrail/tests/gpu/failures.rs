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
    for nth in [1, 2] {
        let mocks = Mocks::load();
        // The first launch of the check copies, the second one hashes; there are two GPUs.
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
fn a_bad_chunk_is_a_miss_and_reaches_no_block() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    for (name, at) in [(1_u64, 100), (2, 4096), (3, 20_000), (4, 38_000)] {
        cache.write(&noise(name, cache.memory.bytes()));
        assert_eq!(cache.store(name, [0, 1]).stored, 1);
        let path = chunk_path(folder.path(), 0, name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 32;
        std::fs::write(&path, bytes).unwrap();
        let before = cache.read();
        let report = cache.load(name, 0, &[6, 7]);
        assert_eq!(report.failed, [0], "a flipped bit at {at}");
        assert!(cache.read() == before, "blocks were written by a bad chunk");
        assert!(!path.exists(), "the bad file was not set aside");
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
    // The KV cache of the test, four for the check of the kernels, two each for the two other ways
    // of copying; then 16, 8, 4, 2 slots and one.
    let refused = |nth| format!("cuMemAlloc nth={nth} error=2");
    mocks.script_cuda(&(10..=14).map(refused).collect::<Vec<_>>().join("\n"));
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
