//! KV cache in the memory of a GPU by cuFile, on mocks: through VRAM slots and in place, and what
//! becomes of every failure: POSIX, with the bytes right.
#![expect(unsafe_code, reason = "makes regions of the mock's device memory")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/gpu_cache.rs"]
mod gpu_cache;
#[path = "../common/machine.rs"]
mod machine;

mod choice;
mod failures;
mod groups;
mod in_place;
mod real;
mod serving;

use std::time::{Duration, Instant};

use common::{LIMIT, chunk, chunk_path, noise, wait_until};
use gpu_cache::{Bench, Cache, Kind, block};
use kvrail::memory::CopyMethod;
use kvrail::store::Route;
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
    let moved = (
        store.metrics().cufile_chunks_stored,
        other.metrics().cufile_chunks_loaded,
    );
    let notices = [store.take_notices(), other.take_notices()];
    assert_eq!(moved, (1, 2), "{kind:?}: {notices:?}");
}

/// A round trip by each way of copying, and by the one that is quickest.
fn round_trips(bench: &mut Bench, kind: Kind) {
    for method in CopyMethod::ALL.map(Some).into_iter().chain([None]) {
        bench.copy_method = method;
        round_trip(bench, kind);
    }
}

#[test]
fn chunks_go_from_one_gpu_to_a_file_to_another_by_cufile_and_everything_is_given_back() {
    let mut bench = Bench::start();
    for kind in KINDS {
        round_trips(&mut bench, kind);
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
    for (kind, words, route) in [
        (
            Kind::LayersOutermost,
            "a block lies in 3 pieces",
            Route::Slot,
        ),
        (
            Kind::BlocksOutermost,
            "blocks read and written in place",
            Route::InPlace,
        ),
    ] {
        let folder = bench.folder();
        let store = bench.open(folder.path());
        let cache = Cache::attach(&bench, &store, 0, kind).unwrap();
        assert_eq!(cache.kv_cache.routes(), [route]);
        drop(cache);
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

#[test]
fn a_bad_chunk_is_a_miss_by_cufile_too_and_costs_it_nothing() {
    for (kind, method) in KINDS
        .into_iter()
        .flat_map(|kind| CopyMethod::ALL.map(|one| (kind, one)))
    {
        let mut bench = Bench::start();
        bench.copy_method = Some(method);
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
