//! KV cache in the memory of a GPU, on a mock whose device memory the CPU cannot touch.
#![expect(unsafe_code, reason = "makes regions of the mock's device memory")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod bursts;
#[path = "../common/mod.rs"]
mod common;
mod failures;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Geometry, LIMIT, chunk, chunk_path, config, namespace, noise};
use kvrail::memory::CopyMethod;
use kvrail::{
    ComputeStream, Device, ErrorKind, KvCache, KvLayout, LayerSpan, LoadChunk, LoadReport,
    OpenOptions, Region, Store, StoreChunk, StoreReport,
};
use kvrail_cuda::{Context, Cuda, DeviceMemory, LibraryPaths, Priority};
use mock_support::Mocks;

/// Seven pages and a bit, blocks that end anywhere in a page, an odd number of layers.
const GEOMETRY: Geometry = Geometry {
    layers: 3,
    block_bytes: 5008,
    blocks_per_chunk: 2,
    blocks: 16,
};
const GAP: usize = 16;
const POISON: u8 = 0xA5;

/// A KV cache on a mock GPU.
struct Cache {
    kv_cache: KvCache,
    memory: Arc<DeviceMemory>,
    context: Context,
}

fn options(mocks: &Mocks) -> OpenOptions {
    OpenOptions {
        libraries: LibraryPaths {
            cuda: vec![mocks.cuda().to_path_buf()],
            ..LibraryPaths::default()
        },
        ..OpenOptions::default()
    }
}

fn open(mocks: &Mocks, path: &Path) -> Store {
    open_by(mocks, path, None)
}

/// Opens a store that copies pieces by `method`, or by what is the quickest here.
fn open_by(mocks: &Mocks, path: &Path, method: Option<CopyMethod>) -> Store {
    let options = OpenOptions {
        copy_method: method,
        ..options(mocks)
    };
    Store::open(&config(path), namespace(), options).unwrap()
}

fn context(mocks: &Mocks, ordinal: usize) -> Context {
    let cuda = Cuda::load(&[mocks.cuda().to_path_buf()]).unwrap();
    cuda.retain_primary(ordinal).unwrap()
}

fn layout() -> (KvLayout, usize) {
    let stride = GEOMETRY.block_bytes + GAP;
    let layer_bytes = stride * GEOMETRY.blocks;
    let bytes = layer_bytes * GEOMETRY.layers;
    let layers = (0..GEOMETRY.layers)
        .map(|layer| LayerSpan {
            region: 0,
            offset: layer * layer_bytes,
            block_stride: stride,
            block_bytes: GEOMETRY.block_bytes,
        })
        .collect();
    (
        KvLayout::new(layers, GEOMETRY.blocks, &[bytes]).unwrap(),
        bytes,
    )
}

impl Cache {
    fn attach(mocks: &Mocks, store: &Store, ordinal: usize) -> kvrail::Result<Self> {
        let (layout, bytes) = layout();
        let context = context(mocks, ordinal);
        let memory = Arc::new(context.allocate(bytes).unwrap());
        // SAFETY: the allocation has these bytes and lives as long as the region's owner.
        let region = unsafe {
            Region::from_raw(
                memory.address() as usize,
                bytes,
                Device::Cuda(ordinal),
                Arc::clone(&memory) as _,
            )
        }
        .unwrap();
        let kv_cache = store.attach(0, 0, layout, vec![region], GEOMETRY.blocks_per_chunk)?;
        let cache = Self {
            kv_cache,
            memory,
            context,
        };
        cache.write(&vec![POISON; bytes]);
        Ok(cache)
    }

    fn write(&self, bytes: &[u8]) {
        let stream = self.context.stream(Priority::Low).unwrap();
        // SAFETY: as long as the allocation; waited for.
        unsafe { stream.copy_to_device(self.memory.address(), bytes.as_ptr(), bytes.len()) }
            .unwrap();
        stream.synchronize().unwrap();
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes()];
        let stream = self.context.stream(Priority::Low).unwrap();
        // SAFETY: as above.
        unsafe { stream.copy_to_host(bytes.as_mut_ptr(), self.memory.address(), bytes.len()) }
            .unwrap();
        stream.synchronize().unwrap();
        bytes
    }

    fn store(&self, name: u64, blocks: [usize; 2]) -> StoreReport {
        let chunk = StoreChunk {
            chunk: chunk(name),
            blocks: blocks.to_vec(),
        };
        self.kv_cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap()
    }

    fn load(&self, name: u64, first_block: usize, blocks: &[usize]) -> LoadReport {
        self.try_load(name, first_block, blocks).unwrap()
    }

    fn try_load(
        &self,
        name: u64,
        first_block: usize,
        blocks: &[usize],
    ) -> kvrail::Result<LoadReport> {
        let chunk = LoadChunk {
            chunk: chunk(name),
            first_block,
            blocks: blocks.to_vec(),
        };
        let ticket = self.kv_cache.load(vec![chunk])?;
        Ok(ticket.wait(LIMIT).unwrap())
    }
}

/// Bytes of one block of all layers in the memory of a KV cache.
fn block(memory: &[u8], block: usize) -> Vec<u8> {
    let stride = GEOMETRY.block_bytes + GAP;
    (0..GEOMETRY.layers)
        .flat_map(|layer| {
            let start = (layer * GEOMETRY.blocks + block) * stride;
            memory[start..start + GEOMETRY.block_bytes].to_vec()
        })
        .collect()
}

/// Stores on one GPU, loads on the other, and compares with what the host's path writes.
fn round_trip(mocks: &Mocks) {
    round_trip_by(mocks, None);
}

fn round_trip_by(mocks: &Mocks, method: Option<CopyMethod>) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_by(mocks, &folder.path().join("gpu"), method);
    let source = Cache::attach(mocks, &store, 0).unwrap();
    let content = noise(7, source.memory.bytes());
    source.write(&content);
    let notices = store.take_notices();
    assert!(
        notices
            .iter()
            .any(|notice| notice.message.starts_with("KV cache on cuda:0: "))
    );
    assert_eq!(source.store(1, [5, 2]).stored, 1);
    // The same chunk from host memory is the same file, byte for byte.
    let host_store = common::open(&folder.path().join("host"));
    let host_region = Region::zeroed(content.len()).unwrap();
    host_region.copy_in(0, &content).unwrap();
    let host = host_store
        .attach(0, 0, layout().0, vec![host_region], 2)
        .unwrap();
    let same = StoreChunk {
        chunk: chunk(1),
        blocks: vec![5, 2],
    };
    assert_eq!(host.store(&[same]).unwrap().wait(LIMIT).unwrap().stored, 1);
    let files =
        ["gpu", "host"].map(|name| std::fs::read(chunk_path(&folder.path().join(name), 0, 1)));
    let [gpu_file, host_file] = files.map(Result::unwrap);
    assert!(gpu_file == host_file, "the GPU's path writes another file");
    // Whole, and only the second block, on another GPU; nothing else is touched.
    let other = open_by(mocks, &folder.path().join("gpu"), method);
    let target = Cache::attach(mocks, &other, 1).unwrap();
    assert_eq!(target.load(1, 0, &[0, 9]).loaded, 1);
    assert_eq!(target.load(1, 1, &[12]).loaded, 1);
    let found = target.read();
    assert!(block(&found, 0) == block(&content, 5), "block 0");
    assert!(block(&found, 9) == block(&content, 2), "block 9");
    assert!(block(&found, 12) == block(&content, 2), "block 12");
    let loaded = 3 * GEOMETRY.layers * GEOMETRY.block_bytes;
    let untouched = found.iter().filter(|byte| **byte == POISON).count();
    // Noise has the poison's value, too, now and then.
    assert!(
        untouched >= found.len() - loaded,
        "bytes outside the blocks were written"
    );
    for other in [1, 3, 8, 10, 11, 13] {
        assert!(
            block(&found, other).iter().all(|byte| *byte == POISON),
            "block {other}"
        );
    }
}

#[test]
fn chunks_go_from_one_gpu_to_a_file_to_another_and_everything_is_given_back() {
    let mocks = Mocks::load();
    round_trip(&mocks);
    for method in CopyMethod::ALL {
        round_trip_by(&mocks, Some(method));
    }
    assert!(
        mocks.cuda_calls("cuLaunchKernel") > 6,
        "the kernels were not used"
    );
    // Threads of a store that was dropped end a moment later.
    let deadline = std::time::Instant::now() + LIMIT;
    while mocks.balance().0 != 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "{:?} objects are left",
            mocks.balance()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_chunk_in_host_memory_goes_to_a_gpu_without_its_file() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config(folder.path());
    settings.local_cpu = true;
    settings.max_local_cpu_size_gb = 1e-3;
    let store = Store::open(&settings, namespace(), options(&mocks)).unwrap();
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let content = noise(9, cache.memory.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [5, 2]).stored, 1);
    std::fs::remove_file(chunk_path(folder.path(), 0, 1)).unwrap();
    assert_eq!(cache.load(1, 0, &[0, 9]).loaded, 1);
    assert_eq!(cache.load(1, 1, &[12]).loaded, 1);
    let found = cache.read();
    assert!(block(&found, 0) == block(&content, 5), "block 0");
    assert!(block(&found, 9) == block(&content, 2), "block 9");
    assert!(block(&found, 12) == block(&content, 2), "block 12");
    assert_eq!(store.metrics().local_cpu_chunks_loaded, 2);
}

#[test]
fn a_chunk_in_memory_that_processes_share_goes_to_a_gpu_without_its_file() {
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: /dev/shm cannot be written here");
        return;
    };
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config(folder.path());
    settings.local_cpu = true;
    settings.max_local_cpu_size_gb = 1e-3;
    settings.local_cpu_shared = Some(memory.path().join("tier"));
    let first = Store::open(&settings, namespace(), options(&mocks)).unwrap();
    let cache = Cache::attach(&mocks, &first, 0).unwrap();
    let content = noise(9, cache.memory.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [5, 2]).stored, 1);
    drop((first, cache));
    std::fs::remove_file(chunk_path(folder.path(), 0, 1)).unwrap();
    let store = Store::open(&settings, namespace(), options(&mocks)).unwrap();
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    assert_eq!(cache.load(1, 0, &[0, 9]).loaded, 1);
    assert_eq!(cache.load(1, 1, &[12]).loaded, 1);
    let found = cache.read();
    assert!(block(&found, 0) == block(&content, 5), "block 0");
    assert!(block(&found, 9) == block(&content, 2), "block 9");
    assert!(block(&found, 12) == block(&content, 2), "block 12");
    assert_eq!(store.metrics().local_cpu_chunks_loaded, 2);
}

#[test]
fn a_graph_that_another_thread_captures_is_not_disturbed() {
    let mocks = Mocks::load();
    mocks.capturing(true);
    round_trip(&mocks);
    mocks.capturing(false);
}

#[test]
fn a_load_comes_after_what_the_compute_stream_still_does_to_its_blocks() {
    let mocks = Mocks::load();
    let folder = tempfile::tempdir().unwrap();
    let store = open(&mocks, folder.path());
    let cache = Cache::attach(&mocks, &store, 0).unwrap();
    let content = noise(1, cache.memory.bytes());
    cache.write(&content);
    assert_eq!(cache.store(1, [0, 1]).stored, 1);
    // A forward that is under way writes all over the KV cache, and nobody has waited for it.
    let compute = cache.context.stream(Priority::Low).unwrap();
    let late = vec![POISON; content.len()];
    // SAFETY: as long as the allocation; waited for below.
    unsafe { compute.copy_to_device(cache.memory.address(), late.as_ptr(), late.len()) }.unwrap();
    let chunk = LoadChunk {
        chunk: chunk(1),
        first_block: 0,
        blocks: vec![4, 5],
    };
    // SAFETY: the stream lives until the end of the test.
    let stream = unsafe { ComputeStream::from_raw(compute.raw()) };
    let ticket = cache.kv_cache.load_after(vec![chunk], stream).unwrap();
    assert_eq!(ticket.wait(LIMIT).unwrap().loaded, 1);
    compute.synchronize().unwrap();
    let found = cache.read();
    assert!(
        block(&found, 4) == block(&content, 0),
        "overwritten by the forward before it"
    );
    assert!(
        block(&found, 5) == block(&content, 1),
        "overwritten by the forward before it"
    );
    assert!(block(&found, 6).iter().all(|byte| *byte == POISON));
}
