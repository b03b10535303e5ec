//! Whole copies on a GPU, and each way of copying pieces, on the mock.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod common;

use std::time::{Duration, Instant};

use common::noise;
use kvrail::chunk::{ChunkFormat, PAGE_BYTES, hash_pages};
use kvrail::layout::TransferPlan;
use kvrail::memory::{CopyMethod, Gpu, GpuSlots, HostArena, SlotShape, StagingPool};
use kvrail::{ErrorKind, KvLayout, LayerSpan, Region};
use kvrail_cuda::Cuda;
use mock_support::Mocks;

const BLOCK_BYTES: usize = 5000;
const BLOCKS: usize = 8;
const LAYERS: usize = 3;

fn layout() -> KvLayout {
    let span = |layer| LayerSpan {
        region: 0,
        offset: layer * BLOCKS * BLOCK_BYTES,
        block_stride: BLOCK_BYTES,
        block_bytes: BLOCK_BYTES,
    };
    let bytes = LAYERS * BLOCKS * BLOCK_BYTES;
    KvLayout::new((0..LAYERS).map(span).collect(), BLOCKS, &[bytes]).unwrap()
}

fn open(mocks: &Mocks) -> Gpu {
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    Gpu::open(&cuda, 1).unwrap()
}

#[test]
fn a_region_of_a_gpu_is_written_and_read_inside_its_bounds() {
    let gpu = open(&Mocks::load());
    let region = gpu.allocate(10_000).unwrap();
    let bytes = noise(1, 10_000);
    gpu.write(&region, 0, &bytes).unwrap();
    gpu.write(&region, 17, &bytes[..100]).unwrap();
    let mut found = vec![0; 9_000];
    gpu.read(&region, 1_000, &mut found).unwrap();
    assert_eq!(found, bytes[1_000..]);
    gpu.read(&region, 0, &mut found[..117]).unwrap();
    assert_eq!(
        (&found[..17], &found[17..117]),
        (&bytes[..17], &bytes[..100])
    );
    assert!(gpu.read(&region, 1_001, &mut found).is_err());
    assert!(gpu.write(&region, usize::MAX, &bytes).is_err());
    let host = Region::zeroed(10_000).unwrap();
    let error = gpu.write(&host, 0, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error.to_string().contains("memory on cpu, not on cuda:1"),
        "{error}"
    );
    let error = gpu.allocate(1 << 40).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gpu);
}

#[test]
fn every_way_of_copying_pieces_brings_the_same_bytes() {
    let mocks = Mocks::load();
    let gpu = open(&mocks);
    let layout = layout();
    let format = ChunkFormat::new(layout.payload_shape(2)).unwrap();
    let shape = SlotShape::new(&layout, &format, 2);
    let slots = GpuSlots::new(&gpu, shape, 2, None).unwrap();
    let region = gpu.allocate(LAYERS * BLOCKS * BLOCK_BYTES).unwrap();
    let memory = noise(2, region.bytes());
    gpu.write(&region, 0, &memory).unwrap();
    let regions = [region];
    let plan = TransferPlan::new(&layout, &[6, 1]).unwrap();
    let expected: Vec<u8> = plan
        .ranges()
        .iter()
        .flat_map(|range| &memory[range.offset..range.offset + range.bytes])
        .copied()
        .collect();
    let pinned = HostArena::pinned(format.file_bytes(), gpu.context()).unwrap();
    let pool = StagingPool::over(pinned, format.file_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let calls = || {
        ["cuLaunchKernel", "cuMemcpyBatchAsync", "cuMemcpyDtoDAsync"]
            .map(|function| mocks.cuda_calls(function))
    };
    for (index, method) in [CopyMethod::Kernel, CopyMethod::Batch, CopyMethod::Pieces]
        .into_iter()
        .enumerate()
    {
        let gpu = gpu.with_method(method).unwrap();
        let (mut slot, mut copy) = (
            slots.try_take(&gpu, 0).unwrap(),
            slots.try_take(&gpu, 0).unwrap(),
        );
        let (start, end) = (
            gpu.context().event().unwrap(),
            gpu.context().event().unwrap(),
        );
        let stream = gpu.store_stream();
        let before = calls();
        stream.record(&start).unwrap();
        slot.gather(stream, &plan, &regions, 4096, &[]).unwrap();
        let after = calls();
        let used: Vec<bool> = before.iter().zip(after).map(|(a, b)| *a < b).collect();
        assert_eq!(used.iter().position(|used| *used), Some(index), "{method}");
        assert_eq!(used.iter().filter(|used| **used).count(), 1, "{method}");
        copy.copy_image(stream, &mut slot, format.file_bytes())
            .unwrap();
        stream.record(&end).unwrap();
        slot.mark(stream).unwrap();
        let mut image = pool.take(deadline).unwrap();
        copy.fetch(stream, 0..format.file_bytes(), &mut image)
            .unwrap();
        copy.mark(stream).unwrap();
        copy.wait(deadline).unwrap();
        assert_eq!(image.as_slice()[4096..4096 + expected.len()], expected);
        let milliseconds = end.milliseconds_since(&start).unwrap();
        assert!((0.0..20_000.0).contains(&milliseconds), "{milliseconds}");
        assert!(copy.copy_image(stream, &mut slot, 1 << 30).is_err());
        let pages = expected.len() / PAGE_BYTES;
        let mut hashes = vec![0; pages];
        hash_pages(&expected[..pages * PAGE_BYTES], &mut hashes);
        slot.hash_pages(stream, 4096, pages, None).unwrap();
        slot.fetch_hashes(stream, pages).unwrap();
        slot.mark(stream).unwrap();
        slot.wait(deadline).unwrap();
        assert_eq!(slot.hashes(pages).unwrap(), hashes);
    }
}

#[test]
fn kernels_that_do_not_work_cannot_be_forced() {
    let mocks = Mocks::load();
    mocks.script_cuda("cuModuleLoadData error=222");
    let gpu = open(&mocks);
    let error = gpu.with_method(CopyMethod::Kernel).unwrap_err();
    assert!(error.to_string().contains("222"), "{error}");
    assert_eq!(
        gpu.with_method(CopyMethod::Pieces).unwrap().method(),
        CopyMethod::Pieces
    );
}
