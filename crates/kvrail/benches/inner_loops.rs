//! What the CPU does with the bytes of a chunk: hashing, copying, and both in one pass or in two.
//!
//! `make bench-loops`. A chunk of llama-3.1-8b: 16 blocks of 32 layers, 32 MiB. Several chunks in turn, so
//! that none is in the CPU's cache.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark that meets an error has failed"
)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvrail::chunk::{PAGE_BYTES, first_bad_page, hash_pages};
use kvrail::layout::TransferPlan;
use kvrail::memory::{Scatter, StagingPool, StagingRange, gather};
use kvrail::{KvLayout, LayerSpan, Region};

const LAYERS: usize = 32;
const BLOCK_BYTES: usize = 64 << 10;
const BLOCKS: usize = 16;
const CHUNK_BYTES: usize = LAYERS * BLOCK_BYTES * BLOCKS;
/// Chunks in turn: 256 MiB, more than a CPU's cache has.
const CHUNKS: usize = 8;
/// What may be hashed and then copied at once. A load takes `WINDOW_PAGES` of `store::verify`.
const WINDOW_PAGES: [usize; 5] = [1, 4, 16, 64, 256];

/// KV cache for all chunks, and their images in staging memory: where the two lie in a page decides
/// how quick a copy is.
struct Ground {
    regions: [Region; 1],
    plans: Vec<TransferPlan>,
    images: Vec<StagingRange>,
    spare: StagingRange,
    tables: Vec<Vec<u64>>,
}

impl Ground {
    fn new() -> Self {
        let blocks = BLOCKS * CHUNKS;
        let layer_bytes = BLOCK_BYTES * blocks;
        let layers = (0..LAYERS)
            .map(|layer| LayerSpan {
                region: 0,
                offset: layer * layer_bytes,
                block_stride: BLOCK_BYTES,
                block_bytes: BLOCK_BYTES,
            })
            .collect();
        let bytes = LAYERS * layer_bytes;
        let layout = KvLayout::new(layers, blocks, &[bytes]).unwrap();
        let region = Region::zeroed(bytes).unwrap();
        let content: Vec<u8> = (0..layer_bytes).map(|at| (at * 31 % 251) as u8).collect();
        for layer in 0..LAYERS {
            region.copy_in(layer * layer_bytes, &content).unwrap();
        }
        let regions = [region];
        let plan = |chunk: usize| {
            let blocks: Vec<usize> = (chunk * BLOCKS..(chunk + 1) * BLOCKS).collect();
            TransferPlan::new(&layout, &blocks).unwrap()
        };
        let plans: Vec<TransferPlan> = (0..CHUNKS).map(plan).collect();
        let pool = StagingPool::new((CHUNKS + 1) * CHUNK_BYTES, CHUNK_BYTES).unwrap();
        let take = || pool.try_take(0).unwrap();
        let image = |plan: &TransferPlan| {
            let mut image = take();
            gather(plan, &regions, image.as_mut_slice()).unwrap();
            image
        };
        let images: Vec<StagingRange> = plans.iter().map(image).collect();
        let table = |image: &StagingRange| {
            let mut table = vec![0; CHUNK_BYTES / PAGE_BYTES];
            hash_pages(image.as_slice(), &mut table);
            table
        };
        let tables = images.iter().map(table).collect();
        let spare = take();
        Self {
            regions,
            plans,
            images,
            spare,
            tables,
        }
    }

    /// Verifies a chunk and copies it to its blocks, so many bytes at a time.
    fn load(&self, chunk: usize, window: usize) {
        let mut scatter = Scatter::new(&self.plans[chunk], &self.regions);
        let tables = self.tables[chunk].chunks(window / PAGE_BYTES);
        for (bytes, table) in self.images[chunk].as_slice().chunks(window).zip(tables) {
            assert_eq!(first_bad_page(bytes, table), None);
            scatter.write(bytes).unwrap();
        }
        assert!(scatter.is_complete());
    }
}

fn inner_loops(criterion: &mut Criterion) {
    let mut ground = Ground::new();
    let mut turn = 0;
    let mut next = move || {
        turn += 1;
        turn % CHUNKS
    };
    let mut group = criterion.benchmark_group("chunk");
    group.measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Bytes(CHUNK_BYTES as u64));
    group.bench_function("plain copy", |bencher| {
        bencher.iter(|| {
            let source = ground.images[next()].as_slice();
            ground.spare.as_mut_slice().copy_from_slice(source);
            black_box(ground.spare.as_slice());
        });
    });
    group.bench_function("hash pages", |bencher| {
        let mut table = vec![0; CHUNK_BYTES / PAGE_BYTES];
        bencher.iter(|| {
            hash_pages(ground.images[next()].as_slice(), &mut table);
            black_box(&table);
        });
    });
    group.bench_function("gather", |bencher| {
        bencher.iter(|| {
            let image = ground.spare.as_mut_slice();
            gather(&ground.plans[next()], &ground.regions, image).unwrap();
            black_box(ground.spare.as_slice());
        });
    });
    group.bench_function("verify, then scatter: two passes", |bencher| {
        bencher.iter(|| ground.load(next(), CHUNK_BYTES));
    });
    for pages in WINDOW_PAGES {
        let name = format!(
            "verify and scatter by {} KiB: one pass",
            (pages * PAGE_BYTES) >> 10
        );
        group.bench_function(name, |bencher| {
            bencher.iter(|| ground.load(next(), pages * PAGE_BYTES));
        });
    }
    group.finish();
}

criterion_group!(benches, inner_loops);
criterion_main!(benches);
