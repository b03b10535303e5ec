//! A KV cache on a mock GPU, on a machine where cuFile may be tried.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kvrail::config::StoreConfig;
use kvrail::memory::CopyMethod;
use kvrail::store::ProbeProgram;
use kvrail::{
    Device, KvCache, KvLayout, LayerSpan, LoadChunk, LoadReport, LoadTicket, OpenOptions, Region,
    Store, StoreChunk, StoreReport,
};
use kvrail_cuda::{Context, Cuda, DeviceMemory, LibraryPaths, Priority, Stream};
use mock_support::Mocks;
use tempfile::TempDir;

use crate::common::{self, LIMIT, chunk, namespace};
use crate::machine::Machine;

pub const POISON: u8 = 0xA5;
const LAYERS: usize = 3;
pub const BLOCKS: usize = 16;

/// How the KV cache lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pieces that end anywhere in a page, with gaps: `LB...`.
    LayersOutermost,
    /// One run of whole pages for each block: `BL...`.
    BlocksOutermost,
}

/// Mocks, a machine, and how a store is opened on them.
pub struct Bench {
    pub mocks: Mocks,
    pub machine: Machine,
    pub libraries: LibraryPaths,
    pub probe: Option<ProbeProgram>,
    pub config: StoreConfig,
    /// How pieces are copied; `None`: as it is quickest here.
    pub copy_method: Option<CopyMethod>,
    /// Why blocks must not be read and written in place.
    pub no_in_place: Option<String>,
}

impl Bench {
    pub fn start() -> Self {
        let mocks = Mocks::load();
        mocks.script_cuda("");
        mocks.script_cufile("");
        let mut config = common::config("/unset".as_ref());
        config.wait_limit_seconds = 20.0;
        Self {
            libraries: LibraryPaths {
                cuda: vec![mocks.cuda().to_path_buf()],
                cufile: vec![mocks.cufile().to_path_buf()],
            },
            mocks,
            machine: Machine::direct(),
            probe: Some(ProbeProgram {
                program: std::env::current_exe().unwrap(),
                arguments: ["probe_program", "--exact", "--ignored", "--nocapture"]
                    .map(Into::into)
                    .to_vec(),
            }),
            config,
            copy_method: None,
            no_in_place: None,
        }
    }

    /// A folder on a file system that takes O_DIRECT, as build folders are.
    pub fn folder(&self) -> TempDir {
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
    }

    pub fn open(&self, path: &Path) -> Store {
        let options = OpenOptions {
            libraries: self.libraries.clone(),
            cufile_probe: self.probe.clone(),
            system: self.machine.view(),
            copy_method: self.copy_method,
            no_in_place: self.no_in_place.clone(),
            ..OpenOptions::default()
        };
        let mut config = self.config.clone();
        config.gds_path = vec![path.to_path_buf()];
        Store::open(&config, namespace(), options).unwrap()
    }

    /// Waits until all objects of both libraries were given back.
    pub fn assert_balance(&self) {
        let deadline = Instant::now() + LIMIT;
        while self.mocks.balance() != (0, 0) {
            assert!(
                Instant::now() < deadline,
                "{:?} are left",
                self.mocks.balance()
            );
            std::thread::yield_now();
        }
    }
}

/// A KV cache in the memory of a mock GPU.
pub struct Cache {
    pub kv_cache: KvCache,
    pub context: Context,
    memory: Arc<DeviceMemory>,
}

fn piece_bytes(kind: Kind) -> usize {
    match kind {
        Kind::LayersOutermost => 5008,
        Kind::BlocksOutermost => 8192,
    }
}

/// Where a piece lies, in bytes.
fn offset(kind: Kind, layer: usize, block: usize) -> usize {
    match kind {
        Kind::LayersOutermost => (layer * BLOCKS + block) * (piece_bytes(kind) + 16),
        Kind::BlocksOutermost => (block * LAYERS + layer) * piece_bytes(kind),
    }
}

fn layout(kind: Kind) -> (KvLayout, usize) {
    let bytes = match kind {
        Kind::LayersOutermost => offset(kind, LAYERS, 0),
        Kind::BlocksOutermost => offset(kind, 0, BLOCKS),
    };
    let layers = (0..LAYERS)
        .map(|layer| LayerSpan {
            region: 0,
            offset: offset(kind, layer, 0),
            block_stride: offset(kind, layer, 1) - offset(kind, layer, 0),
            block_bytes: piece_bytes(kind),
        })
        .collect();
    (KvLayout::new(layers, BLOCKS, &[bytes]).unwrap(), bytes)
}

/// Bytes of one block of all layers in the memory of a KV cache.
pub fn block(kind: Kind, memory: &[u8], block: usize) -> Vec<u8> {
    (0..LAYERS)
        .flat_map(|layer| {
            let start = offset(kind, layer, block);
            memory[start..start + piece_bytes(kind)].to_vec()
        })
        .collect()
}

pub fn is_untouched(kind: Kind, memory: &[u8], which: usize) -> bool {
    block(kind, memory, which)
        .iter()
        .all(|byte| *byte == POISON)
}

/// Stores a chunk of the same memory on the host, into another store.
pub fn store_from_host(path: &Path, kind: Kind, content: &[u8], name: u64, blocks: [usize; 2]) {
    let store = common::open(path);
    let region = Region::zeroed(content.len()).unwrap();
    region.copy_in(0, content).unwrap();
    let cache = store.attach(0, 0, layout(kind).0, vec![region], 2).unwrap();
    let chunk = StoreChunk {
        chunk: chunk(name),
        blocks: blocks.to_vec(),
    };
    let report = cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap();
    assert_eq!(report.stored, 1);
}

/// Returns how many temp files lie in a store.
pub fn leftovers(path: &Path) -> usize {
    let namespaces = std::fs::read_dir(path).unwrap();
    namespaces
        .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap())
        .map(Result::unwrap)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with('.'))
        .map(|folder| std::fs::read_dir(folder.path()).map_or(1, Iterator::count))
        .sum()
}

fn attach_memory(
    store: &Store,
    memory: &Arc<DeviceMemory>,
    ordinal: usize,
    kind: Kind,
    (group, blocks): (u32, usize),
) -> kvrail::Result<KvCache> {
    let (layout, bytes) = layout(kind);
    // SAFETY: the allocation has these bytes and lives as long as the region's owner.
    let region = unsafe {
        Region::from_raw(
            memory.address() as usize,
            bytes,
            Device::Cuda(ordinal),
            Arc::clone(memory) as _,
        )
    }
    .unwrap();
    store.attach(group, 0, layout, vec![region], blocks)
}

impl Cache {
    pub fn attach(
        bench: &Bench,
        store: &Store,
        ordinal: usize,
        kind: Kind,
    ) -> kvrail::Result<Self> {
        let (_, bytes) = layout(kind);
        let cuda = Cuda::load(&[bench.mocks.cuda().to_path_buf()]).unwrap();
        let context = cuda.retain_primary(ordinal).unwrap();
        let memory = Arc::new(context.allocate_at_page(bytes).unwrap());
        let cache = Self {
            kv_cache: attach_memory(store, &memory, ordinal, kind, (0, 2))?,
            memory,
            context,
        };
        cache.write(&vec![POISON; bytes]);
        Ok(cache)
    }

    /// Another KV cache group in the same memory, as vLLM's groups share theirs, with chunks of so
    /// many blocks.
    pub fn attach_group(&self, store: &Store, kind: Kind, group: u32, blocks: usize) -> Self {
        Self {
            kv_cache: attach_memory(store, &self.memory, 0, kind, (group, blocks)).unwrap(),
            memory: Arc::clone(&self.memory),
            context: self.context.clone(),
        }
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    pub fn write(&self, bytes: &[u8]) {
        let stream = self.context.stream(Priority::Low).unwrap();
        // SAFETY: as long as the allocation; waited for.
        unsafe { stream.copy_to_device(self.memory.address(), bytes.as_ptr(), bytes.len()) }
            .unwrap();
        stream.synchronize().unwrap();
    }

    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes()];
        let stream = self.context.stream(Priority::Low).unwrap();
        // SAFETY: as above.
        unsafe { stream.copy_to_host(bytes.as_mut_ptr(), self.memory.address(), bytes.len()) }
            .unwrap();
        stream.synchronize().unwrap();
        bytes
    }

    /// Puts the writing of a block on a stream; `content` stays where it is until that is done.
    pub fn put_block(&self, stream: &Stream, kind: Kind, block: usize, content: &[u8]) {
        for (layer, piece) in content.chunks(piece_bytes(kind)).enumerate() {
            let target = self.address() + offset(kind, layer, block) as u64;
            // SAFETY: inside the allocation; the caller keeps the bytes.
            unsafe { stream.copy_to_device(target, piece.as_ptr(), piece.len()) }.unwrap();
        }
    }

    /// Reads a block behind whatever is on a stream.
    pub fn get_block(&self, stream: &Stream, kind: Kind, block: usize) -> Vec<u8> {
        let mut content = vec![0; LAYERS * piece_bytes(kind)];
        for (layer, piece) in content.chunks_mut(piece_bytes(kind)).enumerate() {
            let source = self.address() + offset(kind, layer, block) as u64;
            // SAFETY: inside the allocation; waited for below.
            unsafe { stream.copy_to_host(piece.as_mut_ptr(), source, piece.len()) }.unwrap();
        }
        stream.synchronize().unwrap();
        content
    }

    pub fn store(&self, name: u64, blocks: impl Into<Vec<usize>>) -> StoreReport {
        let chunk = StoreChunk {
            chunk: chunk(name),
            blocks: blocks.into(),
        };
        self.kv_cache.store(&[chunk]).unwrap().wait(LIMIT).unwrap()
    }

    /// Stores chunks in one call, as a step ends, while the GPU is through with nothing of it.
    pub fn store_step(
        &self,
        bench: &Bench,
        chunks: impl Iterator<Item = (u64, [usize; 2])>,
    ) -> StoreReport {
        let chunks: Vec<StoreChunk> = chunks
            .map(|(name, blocks)| StoreChunk {
                chunk: chunk(name),
                blocks: blocks.to_vec(),
            })
            .collect();
        bench.mocks.script_cuda("cuEventQuery error=600");
        let ticket = self.kv_cache.store(&chunks).unwrap();
        bench.mocks.script_cuda("");
        ticket.wait(LIMIT).unwrap()
    }

    pub fn start_load(&self, name: u64, first_block: usize, blocks: &[usize]) -> LoadTicket {
        let chunk = LoadChunk {
            chunk: chunk(name),
            first_block,
            blocks: blocks.into(),
        };
        self.kv_cache.load(vec![chunk]).unwrap()
    }

    pub fn load(&self, name: u64, first_block: usize, blocks: &[usize]) -> LoadReport {
        self.start_load(name, first_block, blocks)
            .wait(LIMIT)
            .unwrap()
    }
}
