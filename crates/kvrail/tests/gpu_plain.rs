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
use kvrail::memory::{
    ComputeStream, CopyMethod, Gpu, GpuSlots, HostArena, PagesInSlot, SlotShape, StagingPool,
};
use kvrail::{ErrorKind, KvLayout, LayerSpan, Region};
use kvrail_cuda::Cuda;
use mock_support::Mocks;

const BLOCK_BYTES: usize = 5000;
const BLOCKS: usize = 8;
const LAYERS: usize = 3;

fn layout() -> KvLayout {
    layout_of(BLOCK_BYTES)
}

fn layout_of(block_bytes: usize) -> KvLayout {
    layout_in(block_bytes, &std::array::from_fn(|layer| layer))
}

/// A layout whose layers lie at the given places.
fn layout_in(block_bytes: usize, places: &[usize; LAYERS]) -> KvLayout {
    let span = |place: &usize| LayerSpan {
        region: 0,
        offset: place * BLOCKS * block_bytes,
        block_stride: block_bytes,
        block_bytes,
    };
    let bytes = LAYERS * BLOCKS * block_bytes;
    KvLayout::new(places.iter().map(span).collect(), BLOCKS, &[bytes]).unwrap()
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
    let slots = GpuSlots::new(&gpu, shape, 2, 2, None).unwrap();
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
            gpu.context().timed_event().unwrap(),
            gpu.context().timed_event().unwrap(),
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
fn a_slot_that_was_given_up_comes_back_when_both_its_streams_are_through() {
    let mocks = Mocks::load();
    let gpu = open(&mocks);
    let layout = layout();
    let format = ChunkFormat::new(layout.payload_shape(2)).unwrap();
    let shape = SlotShape::new(&layout, &format, 2);
    let slots = GpuSlots::new(&gpu, shape, 1, 1, None).unwrap();
    let regions = [gpu.allocate(LAYERS * BLOCKS * BLOCK_BYTES).unwrap()];
    let plan = TransferPlan::new(&layout, &[6, 1]).unwrap();
    let (compute, own) = (gpu.load_stream(), gpu.store_stream());
    let soon = || Instant::now() + Duration::from_millis(10);
    let mut slot = slots.try_take(&gpu, 0).unwrap();
    slot.gather(compute, &plan, &regions, 4096, &[]).unwrap();
    mocks.script_cuda("cuEventQuery error=600");
    assert_eq!(
        slot.settle_both(compute, own, soon()).unwrap_err().kind(),
        ErrorKind::TimedOut
    );
    drop(slot);
    assert!(slots.try_take(&gpu, 0).is_none(), "the GPU works on it");
    mocks.script_cuda("");
    let mut slot = slots.try_take(&gpu, 0).unwrap();
    // The same for one stream.
    slot.gather(compute, &plan, &regions, 4096, &[]).unwrap();
    mocks.script_cuda("cuEventQuery error=600");
    assert!(slot.settle(compute, soon()).is_err());
    drop(slot);
    mocks.script_cuda("");
    let mut slot = slots.try_take(&gpu, 0).unwrap();
    // A stream that cannot be marked is never known to be through.
    slot.gather(compute, &plan, &regions, 4096, &[]).unwrap();
    mocks.script_cuda("cuStreamWaitEvent error=719");
    assert_eq!(
        slot.settle_both(compute, own, soon()).unwrap_err().kind(),
        ErrorKind::Gpu
    );
    mocks.script_cuda("");
    drop(slot);
    assert!(slots.try_take(&gpu, 0).is_none());
}

#[test]
fn every_way_makes_the_same_image_and_brings_it_back() {
    let mocks = Mocks::load();
    // Multiples of 16, as the kernels that hash want pieces, and others, which go another way.
    for block_bytes in [5008, BLOCK_BYTES] {
        let layout = layout_of(block_bytes);
        assert!(layout.regular().is_some());
        goes_every_way(&open(&mocks), block_bytes, &layout);
    }
    // Two layers exchanged: pieces at no equal steps, which the kernels want in a list.
    let mut places = std::array::from_fn(|layer| layer);
    places.swap(0, 1);
    let layout = layout_in(5008, &places);
    assert!(layout.regular().is_none());
    goes_every_way(&open(&mocks), 5008, &layout);
}

fn goes_every_way(gpu: &Gpu, block_bytes: usize, layout: &KvLayout) {
    let format = ChunkFormat::new(layout.payload_shape(2)).unwrap();
    let shape = SlotShape::new(layout, &format, 2);
    let slots = GpuSlots::new(gpu, shape, 1, 1, None).unwrap();
    let region = gpu.allocate(LAYERS * BLOCKS * block_bytes).unwrap();
    let memory = noise(2, region.bytes());
    let regions = [region];
    let plan = TransferPlan::new(layout, &[6, 1]).unwrap();
    let payload = |memory: &[u8], plan: &TransferPlan| -> Vec<u8> {
        let ranges = plan.ranges().iter();
        let bytes = ranges.flat_map(|range| &memory[range.offset..range.offset + range.bytes]);
        bytes.copied().collect()
    };
    let stored = payload(&memory, &plan);
    let (start, table) = (format.payload_offset(), format.table_offset());
    let mut expected = stored.clone();
    expected.resize(table - start, 0);
    let mut hashes = vec![0; format.page_count()];
    hash_pages(&expected, &mut hashes);
    expected.extend(hashes.iter().flat_map(|hash| hash.to_le_bytes()));
    expected.resize(format.file_bytes() - start, 0);
    let pinned = HostArena::pinned(format.file_bytes(), gpu.context()).unwrap();
    let pool = StagingPool::over(pinned, format.file_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for method in CopyMethod::ALL {
        let gpu = gpu.with_method(method).unwrap();
        let mut slot = slots.take(&gpu, deadline).unwrap();
        let (compute, own) = (gpu.store_stream(), gpu.store_stream());
        gpu.write(&regions[0], 0, &memory).unwrap();
        slot.gather_chunk(&format, &plan, &regions, compute, own)
            .unwrap();
        let mut image = pool.take(deadline).unwrap();
        slot.fetch(own, start..format.file_bytes(), &mut image)
            .unwrap();
        slot.mark(own).unwrap();
        slot.wait(deadline).unwrap();
        assert!(image.as_slice()[..expected.len()] == expected, "{method}");
        // The second block alone, from where it begins in its page.
        let skipped = plan.bytes() / 2;
        let page = skipped / PAGE_BYTES;
        let one = TransferPlan::new(layout, &[3]).unwrap();
        let place = PagesInSlot {
            start: start + page * PAGE_BYTES,
            count: format.page_count() - page,
            expected: table + page * 8,
            payload: start + skipped,
        };
        let verified = slot.scatter_verified(own, &one, &regions, place).unwrap();
        slot.mark(own).unwrap();
        slot.wait(deadline).unwrap();
        let is_taken = method == CopyMethod::HashingKernel && block_bytes.is_multiple_of(16);
        assert_eq!(verified, is_taken, "{method}");
        if verified {
            assert_eq!(slot.bad_page().unwrap(), None);
            let mut found = vec![0; memory.len()];
            gpu.read(&regions[0], 0, &mut found).unwrap();
            assert!(
                payload(&found, &one) == stored[skipped..],
                "the block loaded"
            );
            // Expected hashes that are those of the pages before: the first is bad already.
            let wrong = PagesInSlot {
                expected: table,
                ..place
            };
            assert!(slot.scatter_verified(own, &one, &regions, wrong).unwrap());
            slot.mark(own).unwrap();
            slot.wait(deadline).unwrap();
            assert_eq!(slot.bad_page().unwrap(), Some(0));
            let outside = PagesInSlot {
                payload: place.start - 16,
                ..place
            };
            assert!(slot.scatter_verified(own, &one, &regions, outside).is_err());
        }
    }
}

#[test]
fn the_legacy_default_stream_gets_no_batches() {
    let mocks = Mocks::load();
    for (script, expected) in [
        ("", CopyMethod::Kernel),
        ("cuModuleLoadData error=222", CopyMethod::Pieces),
    ] {
        mocks.script_cuda(script);
        let gpu = open(&mocks).with_method(CopyMethod::Batch).unwrap();
        let default = gpu.compute_stream(ComputeStream::default());
        assert_eq!(gpu.method_on(&default), expected);
        assert_eq!(gpu.method_on(gpu.store_stream()), CopyMethod::Batch);
    }
}

#[test]
fn kernels_that_do_not_work_cannot_be_forced() {
    let mocks = Mocks::load();
    mocks.script_cuda("cuModuleLoadData error=222");
    let gpu = open(&mocks);
    for method in [CopyMethod::HashingKernel, CopyMethod::Kernel] {
        let error = gpu.with_method(method).unwrap_err();
        assert!(error.to_string().contains("222"), "{error}");
    }
    assert_eq!(
        gpu.with_method(CopyMethod::Pieces).unwrap().method(),
        CopyMethod::Pieces
    );
}
