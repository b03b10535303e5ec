//! One way from KV cache on a GPU to files and back, as the store takes it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kvrail::config::{GdsBackend, StoreConfig};
use kvrail::io::MountReport;
use kvrail::memory::Gpu;
use kvrail::store::Route;
use kvrail::{ComputeStream, KvCache, Namespace, Store, StoreChunk};
use kvrail_cuda::Event;

use super::super::clients::{self, Sample};
use super::super::geometry::CHUNK_TOKENS;
use super::super::plan::Plan;
use super::super::submission::{self, Submission, WAIT_LIMIT, chunk_ref, slot_of};
use super::kv_memory::GpuKvMemory;
use super::rounds::Setting;
use crate::failure::Failure;

/// The ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through VRAM slots and pinned memory, with plain system calls.
    Posix,
    /// Through VRAM slots, with cuFile.
    Cufile,
    /// Straight between blocks and files, with cuFile.
    Direct,
}

impl Way {
    /// Returns the name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Posix => "posix",
            Self::Cufile => "cufile",
            Self::Direct => "direct",
        }
    }

    /// Returns whether cuFile moves the bytes.
    pub(crate) fn uses_cufile(self) -> bool {
        self != Self::Posix
    }

    fn config(self, plan: &Plan, path: &Path, compatible: bool) -> StoreConfig {
        StoreConfig {
            chunk_size: CHUNK_TOKENS,
            gds_backend: GdsBackend::Cufile,
            use_cufile: self.uses_cufile(),
            cufile_compat_mode: compatible,
            direct: Some(self == Self::Direct),
            disk_io_threads: plan.threads,
            buffer_mib: plan.buffer_mib,
            ..StoreConfig::with_path(path)
        }
    }
}

/// A store that goes one way, with the KV cache attached.
pub(crate) struct StorePath {
    way: Way,
    gpu: Gpu,
    store: Store,
    cache: KvCache,
    directory: PathBuf,
    compatible: bool,
    in_flight: usize,
    submission: Submission,
}

impl StorePath {
    /// Opens the store below `directory`; the inner error says why the store goes another way.
    ///
    /// Where cuFile has no direct path, its compatible mode is tried: the same calls, whose limit
    /// is that of the same bare calls.
    pub(crate) fn open(
        way: Way,
        plan: &Plan,
        memory: &GpuKvMemory,
        setting: &Setting<'_>,
        directory: &Path,
    ) -> Result<Result<Self, String>, Failure> {
        let path = directory.join(way.name());
        let namespace = Namespace::new(plan.geometry.name, serde_json::Map::new())?;
        let chunks = path.join(namespace.directory_name());
        let modes: &[bool] = if way.uses_cufile() {
            &[false, true]
        } else {
            &[false]
        };
        let mut reasons = Vec::new();
        for compatible in modes {
            let config = way.config(plan, &path, *compatible);
            let store = Store::open(&config, namespace.clone(), setting.options.clone())?;
            store.wait_for_engines(WAIT_LIMIT)?;
            let cache = store.attach(
                0,
                0,
                memory.layout().clone(),
                vec![memory.region()],
                plan.geometry.blocks_per_chunk(),
            )?;
            match goes(way, &store, &cache) {
                Ok(()) => {
                    return Ok(Ok(Self {
                        way,
                        gpu: setting.gpu.clone(),
                        store,
                        cache,
                        directory: chunks,
                        compatible: *compatible,
                        in_flight: plan.in_flight,
                        submission: Submission::default(),
                    }));
                }
                Err(reason) if reasons.contains(&reason) => {}
                Err(reason) => reasons.push(reason),
            }
            drop(cache);
            store.close(WAIT_LIMIT)?;
        }
        Ok(Err(reasons.join("; in the compatible mode: ")))
    }

    /// Returns the way.
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// Returns the bytes of a chunk's file.
    pub(crate) fn chunk_file_bytes(&self) -> usize {
        self.cache.chunk_file_bytes()
    }

    /// Returns how often a chunk was submitted again.
    pub(crate) fn retries(&self) -> u64 {
        self.submission.retries()
    }

    /// Returns what the store says about its mount.
    pub(crate) fn mount(&self) -> Result<MountReport, Failure> {
        let report = self.store.describe().into_iter().next();
        let mut report = report.ok_or_else(|| Failure::new("the store reports no mount"))?;
        if self.compatible {
            report.reason.push_str(", cuFile in its compatible mode");
        }
        Ok(report)
    }

    /// Stores a wave; returns what it took, and the milliseconds that the compute stream was held.
    ///
    /// Held is the time on the GPU between the moments before and after each submission, on a
    /// stream with no other work: that of the gather and of the calls that put it there.
    pub(crate) fn store(
        &self,
        memory: &GpuKvMemory,
        wave: &[u64],
    ) -> Result<(Sample, f64), Failure> {
        let stream = self.gpu.compute_stream(ComputeStream::default());
        let marks: Mutex<Vec<(Event, Event)>> = Mutex::default();
        let mark = || -> kvrail_cuda::Result<Event> {
            let event = self.gpu.context().timed_event()?;
            stream.record(&event)?;
            Ok(event)
        };
        let sample = clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            let chunk = StoreChunk {
                chunk: chunk_ref(item, wave)?,
                blocks: memory.source_blocks(slot_of(wave, item)),
            };
            self.submission.store(&self.store, item, || {
                // One after the other, as a forward ends: else a call's time has others' in it.
                let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
                let start = mark().map_err(held_failure)?;
                let ticket = self
                    .cache
                    .store_after(std::slice::from_ref(&chunk), ComputeStream::default())?;
                let end = mark().map_err(held_failure)?;
                marks.push((start, end));
                Ok(ticket)
            })
        })?;
        stream.synchronize().map_err(held_failure)?;
        let marks = marks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut held = 0.0;
        for (start, end) in marks {
            held += f64::from(end.milliseconds_since(&start).map_err(held_failure)?);
        }
        Ok((sample, held))
    }

    /// Loads a wave.
    pub(crate) fn load(&self, memory: &GpuKvMemory, wave: &[u64]) -> Result<Sample, Failure> {
        clients::run(&mut vec![(); self.in_flight], wave, |(), item| {
            let blocks = memory.target_blocks(slot_of(wave, item));
            submission::load(&self.cache, wave, item, blocks)
        })
    }

    /// Returns the files of all chunks.
    pub(crate) fn chunk_files(&self) -> Result<Vec<PathBuf>, Failure> {
        let files = kvrail::store::inspect::chunks(&self.directory);
        let paths = files.map(|file| file.map(|file| file.path));
        Ok(paths.collect::<kvrail::Result<_>>()?)
    }

    /// Returns why not all chunks went this way.
    pub(crate) fn left_its_way(&self) -> Option<String> {
        let chunks = self.store.metrics().cufile_fallbacks;
        (chunks > 0).then(|| {
            let notices = self.store.take_notices();
            let reasons: Vec<String> = notices.into_iter().map(|notice| notice.message).collect();
            format!("cuFile failed on {chunks} chunks: {}", reasons.join("; "))
        })
    }

    /// Ends the store.
    pub(crate) fn close(self) -> Result<(), Failure> {
        Ok(self.store.close(WAIT_LIMIT)?)
    }
}

/// Checks that the chunks of a KV cache go a way; the error is the store's reason.
fn goes(way: Way, store: &Store, cache: &KvCache) -> Result<(), String> {
    let expected = match way {
        Way::Posix => Route::Posix,
        Way::Cufile => Route::Slot,
        Way::Direct => Route::InPlace,
    };
    if cache.routes() == [expected] {
        return Ok(());
    }
    let notices = store.take_notices().into_iter();
    let mut reasons: Vec<String> = notices.map(|notice| notice.message).collect();
    let reports = store.describe().into_iter();
    reasons.extend(reports.map(|report| format!("engine {}: {}", report.engine, report.reason)));
    Err(reasons.join("; "))
}

fn held_failure(error: kvrail_cuda::Error) -> Failure {
    Failure::new(format!("time the compute stream: {error}"))
}
