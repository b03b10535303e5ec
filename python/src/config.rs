//! The settings, resolved from what Python read.

use std::path::{Path, PathBuf};

use kvrail::config::{
    Admission, ChunkHashing, ConfigSources, DirectoryLayout, Durability, EngineChoice,
    EvictionPolicy, GdsBackend, LoadFailurePolicy, MinFree, PageCache, PathSharding, PathWeights,
    ResolvedConfig, StoreConfig, resolve,
};
use kvrail::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};
use serde_json::{Value, json};

use crate::error::IntoPython;

/// A resolved configuration; immutable.
#[pyclass(frozen, module = "kvrail._core")]
pub(crate) struct Config {
    pub(crate) inner: ResolvedConfig,
}

#[pymethods]
impl Config {
    #[staticmethod]
    #[pyo3(signature = (connector_json, environment, file))]
    fn resolve(
        py: Python<'_>,
        connector_json: Option<&str>,
        environment: &Bound<'_, PyMapping>,
        file: Option<(PathBuf, String)>,
    ) -> PyResult<Self> {
        let connector = connector_json.map(connector).transpose().into_python(py)?;
        let environment = environment.items()?.extract()?;
        let sources = ConfigSources {
            connector: connector.as_ref(),
            environment,
            file,
        };
        let inner = resolve(&sources).into_python(py)?;
        Ok(Self { inner })
    }

    #[getter]
    fn chunk_size(&self) -> usize {
        self.inner.store.chunk_size
    }

    #[getter]
    fn gds_path(&self) -> Vec<String> {
        paths(&self.inner.store)
    }

    #[getter]
    fn buffer_mib(&self) -> usize {
        self.inner.store.buffer_mib
    }

    #[getter]
    fn save_decode_cache(&self) -> bool {
        self.inner.store.save_decode_cache
    }

    /// LMCache's algorithm, where chunk keys are its hashes.
    #[getter]
    fn lmcache_hash(&self) -> Option<&'static str> {
        let store = &self.inner.store;
        store
            .hashes_as_lmcache()
            .then(|| store.pre_caching_hash_algorithm.name())
    }

    #[getter]
    fn load_failure_policy(&self) -> &'static str {
        policy(self.inner.store.load_failure_policy)
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.inner.warnings.clone()
    }

    fn as_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = values(&self.inner.store);
        let entries: serde_json::Map<String, Value> = self
            .inner
            .origins
            .iter()
            .map(|(key, origin)| {
                let entry = json!({ "value": values.get(*key), "origin": origin });
                ((*key).to_owned(), entry)
            })
            .collect();
        let text = Value::Object(entries).to_string();
        Ok(py
            .import("json")?
            .call_method1("loads", (text,))?
            .cast_into()?)
    }
}

fn connector(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| {
        Error::config("kv_connector_extra_config", text, "a JSON object").with_source(error)
    })
}

/// Returns the directories as text; the sources are text, so nothing is lost.
fn paths(store: &StoreConfig) -> Vec<String> {
    store
        .gds_path
        .iter()
        .map(|path| path.to_string_lossy().into_owned())
        .collect()
}

fn policy(policy: LoadFailurePolicy) -> &'static str {
    match policy {
        LoadFailurePolicy::Recompute => "recompute",
        LoadFailurePolicy::Fail => "fail",
    }
}

/// Returns each key's effective value in the form in which a user writes it.
fn values(store: &StoreConfig) -> Value {
    json!({
        "chunk_size": store.chunk_size,
        "gds_path": paths(store),
        "gds_path_sharding": match store.gds_path_sharding {
            PathSharding::ByHash => "by_hash",
            PathSharding::ByGpu => "by_gpu",
        },
        "layout": match store.layout {
            DirectoryLayout::Kvrail => "kvrail",
            DirectoryLayout::Lmcache => "lmcache",
        },
        "chunk_hash": match store.chunk_hash {
            ChunkHashing::Vllm => "vllm",
            ChunkHashing::Lmcache => "lmcache",
        },
        "pre_caching_hash_algorithm": store.pre_caching_hash_algorithm.name(),
        "cufile_buffer_size": store.buffer_mib,
        "local_cpu": store.local_cpu,
        "max_local_cpu_size": store.max_local_cpu_size_gb,
        "use_gds": store.use_gds,
        "gds_backend": match store.gds_backend {
            GdsBackend::Cufile => "cufile",
            GdsBackend::Posix => "posix",
        },
        "max_size": store.max_size,
        "min_free": match store.min_free {
            MinFree::Share(share) => json!(share),
            MinFree::Bytes(bytes) => json!(bytes),
        },
        "low_watermark": store.low_watermark,
        "ttl": store.ttl_seconds,
        "eviction_policy": match store.eviction_policy {
            EvictionPolicy::Lru => "lru",
            EvictionPolicy::Reuse => "reuse",
        },
        "admission": match store.admission {
            Admission::All => "all",
            Admission::SecondUse => "second_use",
        },
        "durability": match store.durability {
            Durability::None => "none",
            Durability::Full => "full",
        },
        "file_mode": store.file_mode.to_string(),
        "save_decode_cache": store.save_decode_cache,
        "min_load_tokens": store.min_load_tokens,
        "extra_config.use_cufile": store.use_cufile,
        "extra_config.cufile_compat_mode": store.cufile_compat_mode,
        "extra_config.direct": store.direct,
        "extra_config.use_direct_io": store.use_direct_io,
        "extra_config.local_cpu_shared": store.local_cpu_shared.as_deref().map(Path::to_string_lossy),
        "extra_config.path_weights": match &store.path_weights {
            PathWeights::Measured => json!("measured"),
            PathWeights::Equal => json!("equal"),
            PathWeights::Listed(list) => json!(list),
        },
        "extra_config.page_cache": match store.page_cache {
            PageCache::Auto => "auto",
            PageCache::Keep => "keep",
            PageCache::Bypass => "bypass",
        },
        "extra_config.io_engine": match store.io_engine {
            EngineChoice::Auto => "auto",
            EngineChoice::Posix => "posix",
            EngineChoice::Uring => "uring",
        },
        "extra_config.disk_io_threads": store.disk_io_threads,
        "extra_config.load_failure_policy": policy(store.load_failure_policy),
        "extra_config.wait_limit_seconds": store.wait_limit_seconds,
        "extra_config.lookup_limit_seconds": store.lookup_limit_seconds,
        "extra_config.lookup_hold_seconds": store.lookup_hold_seconds,
        "extra_config.slow_limit_seconds": store.slow_limit_seconds,
    })
}
