//! The same on NVIDIA's own libcufile: each version that mock-support finds, in its compatibility
//! mode, on the mock of libcuda.

use std::sync::atomic::{AtomicU64, Ordering};

use kvrail_cuda::Cuda;
use mock_support::RealCufile;

use super::*;

#[test]
fn chunks_go_through_nvidias_own_library_and_come_back_right() {
    let libraries = RealCufile::find().unwrap_or_else(|reason| {
        eprintln!("skipped: {reason}");
        Vec::new()
    });
    for library in libraries {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        library.run("real::child", folder.path());
    }
}

#[test]
#[ignore = "started by the test above in a process of its own"]
fn child() {
    let mut bench = Bench::start();
    bench.libraries.cufile = vec![RealCufile::of_this_process().unwrap()];
    let cuda = Cuda::load(&bench.libraries.cuda).unwrap();
    let contexts = [0, 1].map(|ordinal| cuda.retain_primary(ordinal).unwrap());
    let free = || contexts.each_ref().map(|one| one.memory_info().unwrap().0);
    let before = free();
    // There is no direct path, whatever the machine's files say: no version calls it one.
    choice::assert_posix(&bench, Kind::BlocksOutermost, "cuFileDriverOpen: 5001");
    bench.config.cufile_compat_mode = true;
    for kind in KINDS {
        round_trips(&mut bench, kind);
        many_at_once(&bench, kind);
        wait_until("all device memory is given back", || free() == before);
    }
    let library = &bench.libraries.cufile[0];
    wait_until("the driver is closed", || RealCufile::uses(library) == 0);
    eprintln!("chunks went through {}", library.display());
}

/// Threads store and load chunks on two devices at the same time; damage is a miss.
fn many_at_once(bench: &Bench, kind: Kind) {
    const CHUNKS: u64 = 40;
    let folder = bench.folder();
    let store = bench.open(folder.path());
    let caches = [0, 1].map(|ordinal| Cache::attach(bench, &store, ordinal, kind).unwrap());
    let content = noise(3, caches[0].bytes());
    caches.iter().for_each(|cache| cache.write(&content));
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (cache, next, content) = (&caches[thread % 2], &next, &content);
            scope.spawn(move || {
                loop {
                    let name = next.fetch_add(1, Ordering::Relaxed);
                    if name >= CHUNKS {
                        return;
                    }
                    let first = name as usize % 4;
                    assert_eq!(cache.store(name, [first, first + 4]).stored, 1);
                    let target = 8 + 2 * thread;
                    assert_eq!(cache.load(name, 0, &[target, target + 1]).loaded, 1);
                    let found = cache.read();
                    for (at, from) in [(target, first), (target + 1, first + 4)] {
                        assert!(block(kind, &found, at) == block(kind, content, from));
                    }
                }
            });
        }
    });
    let metrics = store.metrics();
    assert_eq!(
        (metrics.cufile_chunks_stored, metrics.cufile_chunks_loaded),
        (CHUNKS, CHUNKS),
        "{kind:?}"
    );
    for name in 0..CHUNKS {
        let path = chunk_path(folder.path(), 0, name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let loaded = caches[name as usize % 2].load(name, 0, &[14, 15]);
        assert_eq!(loaded.failed, [0], "{kind:?}: damage was not found");
    }
    assert_eq!(store.metrics().cufile_mounts_downgraded, 0);
}
