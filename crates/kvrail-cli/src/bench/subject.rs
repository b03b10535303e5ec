//! A store under test: kvrail with one engine.

use std::path::PathBuf;

use kvrail::config::{EngineChoice, GdsBackend, StoreConfig};
use kvrail::io::MountReport;
use kvrail::{KvCache, Namespace, OpenOptions, Store, StoreChunk};

use super::clients::{self, Sample};
use super::geometry::CHUNK_TOKENS;
use super::kv_memory::KvMemory;
use super::mix::Mix;
use super::plan::{LoadSource, Plan};
use super::submission::{self, Submission, WAIT_LIMIT, chunk_ref, slot_of};
use crate::failure::Failure;

/// A store, and the memory that it stores from and loads into.
pub(crate) struct Subject {
    store: Store,
    /// That of the namespace, on each path.
    directories: Vec<PathBuf>,
    source_cache: KvCache,
    target_cache: KvCache,
    submission: Submission,
    in_flight: usize,
}

impl Subject {
    /// Opens a store over `paths`, and over the memory to store from and the memory to load into.
    pub(crate) fn open(
        plan: &Plan,
        engine: EngineChoice,
        paths: &[PathBuf],
        memories: [&KvMemory; 2],
    ) -> Result<Self, Failure> {
        let geometry = plan.geometry;
        let config = config(plan, engine, paths);
        let namespace = Namespace::new(geometry.name, serde_json::Map::new())?;
        let name = namespace.directory_name();
        let directories = paths.iter().map(|path| path.join(&name)).collect();
        let store = Store::open(&config, namespace, OpenOptions::default())?;
        // What is measured is the engine that is chosen, alone with the disk.
        store.wait_for_engines(WAIT_LIMIT)?;
        let attach = |memory: &KvMemory| -> Result<KvCache, Failure> {
            let regions = vec![memory.region()];
            Ok(store.attach(0, 0, memory.layout()?, regions, geometry.blocks_per_chunk())?)
        };
        let [source, target] = memories;
        Ok(Self {
            source_cache: attach(source)?,
            target_cache: attach(target)?,
            store,
            directories,
            submission: Submission::default(),
            in_flight: plan.in_flight,
        })
    }

    /// Returns the bytes of a chunk's file.
    pub(crate) fn file_bytes(&self) -> usize {
        self.source_cache.chunk_file_bytes()
    }

    /// Returns how often a chunk was submitted again.
    pub(crate) fn retries(&self) -> u64 {
        self.submission.retries()
    }

    /// Returns how many chunks were loaded from the store's own memory so far.
    pub(crate) fn loaded_from_memory(&self) -> u64 {
        self.store.metrics().local_cpu_chunks_loaded
    }

    /// Stores a wave of chunks from `source`.
    pub(crate) fn store(&self, source: &KvMemory, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            self.store_one(source, wave, item)
        })
    }

    /// Loads a wave of chunks into `target`.
    pub(crate) fn load(&self, target: &KvMemory, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            self.load_one(target, wave, item)
        })
    }

    /// Loads and stores at the same time.
    pub(crate) fn mix(
        &self,
        source: &KvMemory,
        target: &KvMemory,
        mix: &Mix,
    ) -> Result<Sample, Failure> {
        mix.run(
            &mut vec![(); self.in_flight],
            |(), item| self.load_one(target, &mix.wave, item),
            |(), item| self.store_one(source, &mix.new, item),
        )
    }

    /// Stores one chunk of a wave and waits.
    fn store_one(&self, source: &KvMemory, wave: &[u64], item: u64) -> Result<(), Failure> {
        let chunk = StoreChunk {
            chunk: chunk_ref(item, wave)?,
            blocks: source.blocks(slot_of(wave, item)),
        };
        let submit = || Ok(self.source_cache.store(std::slice::from_ref(&chunk))?);
        self.submission.store(&self.store, item, submit)
    }

    /// Loads one chunk of a wave and waits.
    fn load_one(&self, target: &KvMemory, wave: &[u64], item: u64) -> Result<(), Failure> {
        let blocks = target.blocks(slot_of(wave, item));
        submission::load(&self.target_cache, wave, item, blocks)
    }

    /// Returns the files of all chunks.
    pub(crate) fn chunk_files(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut files = Vec::new();
        for directory in &self.directories {
            for file in kvrail::store::inspect::chunks(directory) {
                files.push(file?.path);
            }
        }
        Ok(files)
    }

    /// Ends the store and returns what it said of its path.
    pub(crate) fn close(&self) -> Result<MountReport, Failure> {
        let report = self.store.describe().into_iter().next();
        self.store.close(WAIT_LIMIT)?;
        report.ok_or_else(|| Failure::new("the store reports no mount"))
    }
}

/// Returns the settings of a store under test.
pub(crate) fn config(plan: &Plan, engine: EngineChoice, paths: &[PathBuf]) -> StoreConfig {
    let config = StoreConfig {
        chunk_size: CHUNK_TOKENS,
        gds_backend: GdsBackend::Posix,
        io_engine: engine,
        disk_io_threads: plan.threads,
        buffer_mib: plan.buffer_mib,
        use_direct_io: plan.direct,
        gds_path: paths.to_vec(),
        ..StoreConfig::with_path(PathBuf::new())
    };
    match plan.load_source {
        LoadSource::Disk | LoadSource::PageCache => config,
        LoadSource::Memory { gigabytes, .. } => StoreConfig {
            local_cpu: true,
            max_local_cpu_size_gb: gigabytes,
            local_cpu_shared: shared_memory(plan, paths),
            ..config
        },
    }
}

/// Returns the directory of the memory that processes share, another one for each store: they have
/// the same chunks.
fn shared_memory(plan: &Plan, paths: &[PathBuf]) -> Option<PathBuf> {
    let name = paths.first()?.file_name()?;
    Some(plan.shared_memory.as_ref()?.join(name))
}
