//! The keys that kvrail implements: their names, where they stand, and how a value is taken.

use serde_json::Value;

use super::choices::{
    Admission, ChunkHashing, DirectoryLayout, Durability, EngineChoice, EvictionPolicy, GdsBackend,
    LmcacheHash, LoadFailurePolicy, PageCache, PathSharding,
};
use super::store_config::{
    BUFFER_MIB, CHUNK_SIZE, DISK_IO_THREADS, LOOKUP_HOLD_SECONDS, LOOKUP_LIMIT_SECONDS,
    LOW_WATERMARK, MAX_LOCAL_CPU_SIZE_GB, MIN_LOAD_TOKENS, SLOW_LIMIT_SECONDS, StoreConfig,
    TTL_SECONDS, WAIT_LIMIT_SECONDS,
};
use super::value::{self, Parsed};

/// The mapping that holds LMCache's less common keys.
pub(super) const EXTRA_CONFIG: &str = "extra_config";

/// The key of LMCache's hash algorithm, which has a meaning only where its hashes are used.
pub(super) const LMCACHE_HASH: &str = "pre_caching_hash_algorithm";

/// One key that kvrail implements.
pub(super) struct Key {
    /// The full name: `chunk_size`, or `extra_config.use_cufile` for one of the nested mapping.
    pub(super) name: &'static str,
    /// Other names with the same meaning.
    pub(super) aliases: &'static [&'static str],
    /// Reads a value into the configuration, or says what was expected.
    pub(super) set: fn(&mut StoreConfig, &Value) -> Parsed<()>,
}

impl Key {
    /// Returns the name without the mapping it may stand in.
    pub(super) fn bare(&self) -> &'static str {
        self.name.strip_prefix("extra_config.").unwrap_or(self.name)
    }

    /// Returns whether the key's own place is the nested mapping.
    pub(super) fn is_nested(&self) -> bool {
        self.bare() != self.name
    }

    /// Returns every name that the key has at the top level of a source.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        [self.bare(), self.name]
            .into_iter()
            .chain(self.aliases.iter().copied())
    }
}

/// Finds the key with this name at the top level of a source.
///
/// A key of the nested mapping is taken there too: it can mean nothing else.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter()
        .find(|key| key.names().any(|known| known == name))
}

/// Finds the key with this name inside the nested mapping.
pub(super) fn find_nested(name: &str) -> Option<&'static Key> {
    KEYS.iter()
        .find(|key| key.is_nested() && key.bare() == name)
}

/// Every key, in the order of the documentation.
pub(super) static KEYS: &[Key] = &[
    Key {
        name: "chunk_size",
        aliases: &[],
        set: |config, given| {
            value::whole(given, &CHUNK_SIZE, "tokens").map(|size| config.chunk_size = size)
        },
    },
    Key {
        name: "gds_path",
        aliases: &[],
        set: |config, given| value::paths(given).map(|paths| config.gds_path = paths),
    },
    Key {
        name: "gds_path_sharding",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("by_hash", PathSharding::ByHash),
                ("by_gpu", PathSharding::ByGpu),
            ];
            value::word(given, &choices).map(|choice| config.gds_path_sharding = choice)
        },
    },
    Key {
        name: "layout",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("kvrail", DirectoryLayout::Kvrail),
                ("lmcache", DirectoryLayout::Lmcache),
            ];
            value::word(given, &choices).map(|choice| config.layout = choice)
        },
    },
    Key {
        name: "chunk_hash",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("vllm", ChunkHashing::Vllm),
                ("lmcache", ChunkHashing::Lmcache),
            ];
            value::word(given, &choices).map(|choice| config.chunk_hash = choice)
        },
    },
    Key {
        name: LMCACHE_HASH,
        aliases: &[],
        set: |config, given| {
            let choices = [
                LmcacheHash::Builtin,
                LmcacheHash::Sha256,
                LmcacheHash::Sha256Cbor,
                LmcacheHash::Xxhash,
                LmcacheHash::XxhashCbor,
            ]
            .map(|hash| (hash.name(), hash));
            value::word(given, &choices).map(|hash| config.pre_caching_hash_algorithm = hash)
        },
    },
    Key {
        name: "cufile_buffer_size",
        aliases: &["gds_buffer_size"],
        set: |config, given| {
            value::whole(given, &BUFFER_MIB, "MiB").map(|size| config.buffer_mib = size)
        },
    },
    Key {
        name: "local_cpu",
        aliases: &[],
        set: |config, given| value::boolean(given).map(|switch| config.local_cpu = switch),
    },
    Key {
        name: "max_local_cpu_size",
        aliases: &[],
        set: |config, given| {
            value::number(given, &MAX_LOCAL_CPU_SIZE_GB, "GB")
                .map(|size| config.max_local_cpu_size_gb = size)
        },
    },
    Key {
        name: "use_gds",
        aliases: &[],
        set: |config, given| value::boolean(given).map(|switch| config.use_gds = switch),
    },
    Key {
        name: "gds_backend",
        aliases: &[],
        set: |config, given| {
            let choices = [("cufile", GdsBackend::Cufile), ("posix", GdsBackend::Posix)];
            value::word(given, &choices).map(|choice| config.gds_backend = choice)
        },
    },
    Key {
        name: "max_size",
        aliases: &[],
        set: |config, given| value::limit(given).map(|limit| config.max_size = limit),
    },
    Key {
        name: "min_free",
        aliases: &[],
        set: |config, given| value::min_free(given).map(|free| config.min_free = free),
    },
    Key {
        name: "low_watermark",
        aliases: &[],
        set: |config, given| {
            value::share_within(given, &LOW_WATERMARK).map(|share| config.low_watermark = share)
        },
    },
    Key {
        name: "ttl",
        aliases: &[],
        set: |config, given| {
            value::ttl(given, &TTL_SECONDS).map(|seconds| config.ttl_seconds = seconds)
        },
    },
    Key {
        name: "eviction_policy",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("lru", EvictionPolicy::Lru),
                ("reuse", EvictionPolicy::Reuse),
            ];
            value::word(given, &choices).map(|choice| config.eviction_policy = choice)
        },
    },
    Key {
        name: "admission",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("all", Admission::All),
                ("second_use", Admission::SecondUse),
            ];
            value::word(given, &choices).map(|choice| config.admission = choice)
        },
    },
    Key {
        name: "durability",
        aliases: &[],
        set: |config, given| {
            let choices = [("none", Durability::None), ("full", Durability::Full)];
            value::word(given, &choices).map(|choice| config.durability = choice)
        },
    },
    Key {
        name: "file_mode",
        aliases: &[],
        set: |config, given| value::file_mode(given).map(|mode| config.file_mode = mode),
    },
    Key {
        name: "save_decode_cache",
        aliases: &[],
        set: |config, given| value::boolean(given).map(|switch| config.save_decode_cache = switch),
    },
    Key {
        name: "min_load_tokens",
        aliases: &["min_retrieve_tokens"],
        set: |config, given| {
            value::whole_or_auto(given, &MIN_LOAD_TOKENS, "tokens")
                .map(|tokens| config.min_load_tokens = tokens)
        },
    },
    Key {
        name: "extra_config.use_cufile",
        aliases: &[],
        set: |config, given| value::boolean(given).map(|switch| config.use_cufile = switch),
    },
    Key {
        name: "extra_config.cufile_compat_mode",
        aliases: &[],
        set: |config, given| value::boolean(given).map(|switch| config.cufile_compat_mode = switch),
    },
    Key {
        name: "extra_config.direct",
        aliases: &[],
        set: |config, given| value::boolean_or_auto(given).map(|switch| config.direct = switch),
    },
    Key {
        name: "extra_config.use_direct_io",
        aliases: &[],
        set: |config, given| {
            value::boolean_or_auto(given).map(|switch| config.use_direct_io = switch)
        },
    },
    Key {
        name: "extra_config.local_cpu_shared",
        aliases: &[],
        set: |config, given| {
            value::directory(given).map(|path| config.local_cpu_shared = Some(path))
        },
    },
    Key {
        name: "extra_config.path_weights",
        aliases: &[],
        set: |config, given| value::weights(given).map(|weights| config.path_weights = weights),
    },
    Key {
        name: "extra_config.page_cache",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("auto", PageCache::Auto),
                ("keep", PageCache::Keep),
                ("bypass", PageCache::Bypass),
            ];
            value::word(given, &choices).map(|choice| config.page_cache = choice)
        },
    },
    Key {
        name: "extra_config.io_engine",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("auto", EngineChoice::Auto),
                ("posix", EngineChoice::Posix),
                ("uring", EngineChoice::Uring),
            ];
            value::word(given, &choices).map(|choice| config.io_engine = choice)
        },
    },
    Key {
        name: "extra_config.disk_io_threads",
        aliases: &[],
        set: |config, given| {
            value::whole(given, &DISK_IO_THREADS, "threads")
                .map(|threads| config.disk_io_threads = threads)
        },
    },
    Key {
        name: "extra_config.load_failure_policy",
        aliases: &[],
        set: |config, given| {
            let choices = [
                ("recompute", LoadFailurePolicy::Recompute),
                ("fail", LoadFailurePolicy::Fail),
            ];
            value::word(given, &choices).map(|choice| config.load_failure_policy = choice)
        },
    },
    Key {
        name: "extra_config.wait_limit_seconds",
        aliases: &[],
        set: |config, given| {
            value::number(given, &WAIT_LIMIT_SECONDS, "seconds")
                .map(|seconds| config.wait_limit_seconds = seconds)
        },
    },
    Key {
        name: "extra_config.lookup_limit_seconds",
        aliases: &[],
        set: |config, given| {
            value::number(given, &LOOKUP_LIMIT_SECONDS, "seconds")
                .map(|seconds| config.lookup_limit_seconds = seconds)
        },
    },
    Key {
        name: "extra_config.lookup_hold_seconds",
        aliases: &[],
        set: |config, given| {
            value::number(given, &LOOKUP_HOLD_SECONDS, "seconds")
                .map(|seconds| config.lookup_hold_seconds = seconds)
        },
    },
    Key {
        name: "extra_config.slow_limit_seconds",
        aliases: &[],
        set: |config, given| {
            value::number(given, &SLOW_LIMIT_SECONDS, "seconds")
                .map(|seconds| config.slow_limit_seconds = seconds)
        },
    },
];
