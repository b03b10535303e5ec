//! The typed settings of one store, their defaults and their ranges.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::choices::{
    Admission, ChunkHashing, DirectoryLayout, Durability, EngineChoice, EvictionPolicy, GdsBackend,
    LmcacheHash, LoadFailurePolicy, MinFree, PageCache, PathSharding, PathWeights,
};
use super::file_mode::FileMode;
use crate::error::{Error, Result};

/// Tokens of a chunk; the upper end is whatever memory holds, which the buffer check decides.
pub(super) const CHUNK_SIZE: RangeInclusive<u64> = 1..=u64::MAX;
/// MiB of the staging memory: up to 1 TiB, above which a unit was surely mistaken.
pub(super) const BUFFER_MIB: RangeInclusive<u64> = 1..=1 << 20;
/// Least tokens of a hit that is loaded: up to a billion, which no prompt has.
pub(super) const MIN_LOAD_TOKENS: RangeInclusive<u64> = 0..=1_000_000_000;
/// Threads of the I/O engine: a queue of 256 keeps any one mount busy.
pub(super) const DISK_IO_THREADS: RangeInclusive<u64> = 1..=256;
/// GB of the DRAM tier: up to a million GB, above which a unit was surely mistaken.
pub(super) const MAX_LOCAL_CPU_SIZE_GB: RangeInclusive<f64> = 0.0..=1_000_000.0;
/// Share of the limit down to which eviction goes: below a half, most of a cache would go at once.
pub(super) const LOW_WATERMARK: RangeInclusive<f64> = 0.5..=0.99;
/// Seconds that a chunk is kept without use: from a minute, which one pass over a store takes, to
/// a hundred years.
pub(super) const TTL_SECONDS: RangeInclusive<f64> = 60.0..=3.2e9;
/// Seconds that one I/O may take: a hung mount must not hold a request for longer than an hour.
pub(super) const WAIT_LIMIT_SECONDS: RangeInclusive<f64> = 0.1..=3600.0;

/// Seconds that one lookup may take: longer, and computing is quicker than asking.
pub(super) const LOOKUP_LIMIT_SECONDS: RangeInclusive<f64> = 0.1..=3600.0;
/// Seconds that the answer of a lookup holds; 0 asks the file system each time.
pub(super) const LOOKUP_HOLD_SECONDS: RangeInclusive<f64> = 0.0..=3600.0;
/// Seconds from which an operation is slow.
pub(super) const SLOW_LIMIT_SECONDS: RangeInclusive<f64> = 0.01..=3600.0;
/// The key of the weights of directories, the only one that has to go with another.
pub(super) const PATH_WEIGHTS: &str = "extra_config.path_weights";
/// Weights of directories; what counts is their ratio.
pub(super) const PATH_WEIGHT: RangeInclusive<f64> = 0.001..=1_000_000.0;

/// The settings that a store is opened with.
///
/// Made by [`resolve`](super::resolve) from a user's sources, or by [`StoreConfig::with_path`] in
/// code; [`StoreConfig::validate`] checks one that was changed by hand.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreConfig {
    /// Tokens of one chunk; the connector needs a multiple of vLLM's block size. Default: 256.
    pub chunk_size: usize,
    /// The directories that hold the chunks, absolute, at least one. No default.
    pub gds_path: Vec<PathBuf>,
    /// How chunks are spread over several directories. Default: [`PathSharding::ByHash`].
    pub gds_path_sharding: PathSharding,
    /// Whose directory it is. Default: [`DirectoryLayout::Kvrail`].
    pub layout: DirectoryLayout,
    /// What chunk keys are made of; see [`StoreConfig::hashes_as_lmcache`]. Default:
    /// [`ChunkHashing::Vllm`].
    pub chunk_hash: ChunkHashing,
    /// LMCache's algorithm, where its hashes are used. Default: [`LmcacheHash::Builtin`].
    pub pre_caching_hash_algorithm: LmcacheHash,
    /// Staging memory in MiB (`cufile_buffer_size` and `gds_buffer_size`). Default: 512.
    pub buffer_mib: usize,
    /// Whether host memory is kept as a tier in front of the files. Default: false.
    pub local_cpu: bool,
    /// Size of that tier in GB (10^9 bytes). Default: 5.
    pub max_local_cpu_size_gb: f64,
    /// The directory, on a tmpfs, of memory that all processes of the machine share as their tier
    /// (`extra_config.local_cpu_shared`); `None`: each has its own. Default: `None`.
    pub local_cpu_shared: Option<PathBuf>,
    /// Whether GPUDirect Storage may be used at all. Default: true.
    pub use_gds: bool,
    /// Which engine moves bytes when GPUDirect Storage may be used. Default:
    /// [`GdsBackend::Cufile`].
    pub gds_backend: GdsBackend,
    /// Whether cuFile may be used (`extra_config.use_cufile`). Default: true.
    pub use_cufile: bool,
    /// Whether cuFile is used where it has no direct path, in its compatibility mode
    /// (`extra_config.cufile_compat_mode`): for comparisons, it is no better than POSIX there.
    /// Default: false.
    pub cufile_compat_mode: bool,
    /// Whether cuFile reads and writes KV cache in place, with no copy (`extra_config.direct`);
    /// `None`: where path and layout allow it. `true` also asks vLLM for such a layout on a path
    /// that is not known to be direct. Default: `None`.
    pub direct: Option<bool>,
    /// Whether files are opened with `O_DIRECT`; `None` leaves it to a probe of each mount.
    /// Default: `None`.
    pub use_direct_io: Option<bool>,
    /// How large a share of the chunks each directory gets, placed by hash
    /// (`extra_config.path_weights`). Default: [`PathWeights::Measured`].
    pub path_weights: PathWeights,
    /// What loads and stores have to do with the page cache (`extra_config.page_cache`). Default:
    /// [`PageCache::Auto`].
    pub page_cache: PageCache,
    /// What moves bytes between files and staging memory of the host. Default:
    /// [`EngineChoice::Auto`].
    pub io_engine: EngineChoice,
    /// Threads that do file I/O. Default: 4.
    pub disk_io_threads: usize,
    /// Most bytes kept in each directory; `None` is unlimited. Default: `None`.
    pub max_size: Option<u64>,
    /// Free space left on each file system. Default: 5% of it.
    pub min_free: MinFree,
    /// Share of `max_size` (or of what `min_free` leaves) down to which chunks are evicted once
    /// there are too many. Default: 0.9.
    pub low_watermark: f64,
    /// Seconds after which a chunk that nobody used is evicted; `None` is never. Default: `None`.
    pub ttl_seconds: Option<f64>,
    /// Which chunks are evicted first. Default: [`EvictionPolicy::Lru`].
    pub eviction_policy: EvictionPolicy,
    /// Which chunks are stored while room is short. Default: [`Admission::All`].
    pub admission: Admission,
    /// What a published chunk survives. Default: [`Durability::None`].
    pub durability: Durability,
    /// Permission bits of new files, and of new folders with the right to enter. Default: 0600.
    pub file_mode: FileMode,
    /// Whether chunks that fill up while decoding are stored too. Default: false.
    pub save_decode_cache: bool,
    /// Least tokens of a hit that the connector loads; `None` measures and loads what is not
    /// computed more quickly. Default: `None`.
    pub min_load_tokens: Option<usize>,
    /// What happens to a request whose load failed. Default: [`LoadFailurePolicy::Recompute`].
    pub load_failure_policy: LoadFailurePolicy,
    /// Longest wait for one I/O in seconds. Default: 30.
    pub wait_limit_seconds: f64,
    /// Longest wait for one lookup in seconds, after which nothing counts as there. Default: 5.
    pub lookup_limit_seconds: f64,
    /// Seconds for which a chunk that a lookup found counts as there without being looked for
    /// again. Default: 5.
    pub lookup_hold_seconds: f64,
    /// Seconds from which a file operation is slow; a transfer may take a second more for each
    /// 4 MB. Several slow ones in a row take the path out of use for a while. Default: 2.
    pub slow_limit_seconds: f64,
}

impl StoreConfig {
    /// Returns the defaults with one directory.
    pub fn with_path(path: impl Into<PathBuf>) -> Self {
        Self {
            gds_path: vec![path.into()],
            ..Self::unset()
        }
    }

    /// Returns the defaults with no directory yet, which is not valid on its own.
    pub(super) fn unset() -> Self {
        Self {
            chunk_size: 256,
            gds_path: Vec::new(),
            gds_path_sharding: PathSharding::default(),
            layout: DirectoryLayout::default(),
            chunk_hash: ChunkHashing::default(),
            pre_caching_hash_algorithm: LmcacheHash::default(),
            buffer_mib: 512,
            local_cpu: false,
            max_local_cpu_size_gb: 5.0,
            local_cpu_shared: None,
            use_gds: true,
            gds_backend: GdsBackend::default(),
            use_cufile: true,
            cufile_compat_mode: false,
            direct: None,
            use_direct_io: None,
            path_weights: PathWeights::default(),
            page_cache: PageCache::default(),
            io_engine: EngineChoice::default(),
            disk_io_threads: 4,
            max_size: None,
            min_free: MinFree::default(),
            low_watermark: 0.9,
            ttl_seconds: None,
            eviction_policy: EvictionPolicy::default(),
            admission: Admission::default(),
            durability: Durability::default(),
            file_mode: FileMode::default(),
            save_decode_cache: false,
            min_load_tokens: None,
            load_failure_policy: LoadFailurePolicy::default(),
            wait_limit_seconds: 30.0,
            lookup_limit_seconds: 5.0,
            lookup_hold_seconds: 5.0,
            slow_limit_seconds: 2.0,
        }
    }

    /// Returns whether cuFile is wanted: none of the three keys that choose an engine forces POSIX,
    /// and chunks are not put into another order on their way, which the CPU does.
    pub fn wants_cufile(&self) -> bool {
        let is_own = self.layout == DirectoryLayout::Kvrail;
        is_own && self.use_gds && self.use_cufile && self.gds_backend == GdsBackend::Cufile
    }

    /// Returns whether chunk keys are LMCache's hashes: its own files have no other names.
    pub fn hashes_as_lmcache(&self) -> bool {
        self.layout == DirectoryLayout::Lmcache || self.chunk_hash == ChunkHashing::Lmcache
    }

    /// Checks that nothing is asked for that LMCache's directory does not have.
    fn check_layout(&self) -> Result<()> {
        if self.layout == DirectoryLayout::Kvrail {
            return Ok(());
        }
        // LMCache counts nothing and removes nothing, and would not notice that a chunk has gone.
        if let Some(bytes) = self.max_size {
            let expected = "unlimited with `layout: lmcache`, where nothing is evicted";
            return Err(Error::config("max_size", bytes, expected));
        }
        if let Some(seconds) = self.ttl_seconds {
            let expected = "unlimited with `layout: lmcache`, where nothing is evicted";
            return Err(Error::config("ttl", seconds, expected));
        }
        if self.gds_path.len() > 1 && self.gds_path_sharding != PathSharding::ByGpu {
            let expected =
                "by_gpu with `layout: lmcache` and several directories, as LMCache has it";
            return Err(Error::config("gds_path_sharding", "by_hash", expected));
        }
        Ok(())
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig), naming the first key that is
    /// out of range.
    pub fn validate(&self) -> Result<()> {
        self.check_layout()?;
        check_whole("chunk_size", self.chunk_size, &CHUNK_SIZE)?;
        check_whole("cufile_buffer_size", self.buffer_mib, &BUFFER_MIB)?;
        check_whole(
            "extra_config.disk_io_threads",
            self.disk_io_threads,
            &DISK_IO_THREADS,
        )?;
        check_number(
            "max_local_cpu_size",
            self.max_local_cpu_size_gb,
            &MAX_LOCAL_CPU_SIZE_GB,
        )?;
        if let Some(path) = &self.local_cpu_shared {
            check_path(path).map_err(|expected| {
                let value = format!("`{}`", path.display());
                Error::config("extra_config.local_cpu_shared", value, expected)
            })?;
        }
        let wait = self.wait_limit_seconds;
        check_number("extra_config.wait_limit_seconds", wait, &WAIT_LIMIT_SECONDS)?;
        let (lookup, slow) = (self.lookup_limit_seconds, self.slow_limit_seconds);
        check_number(
            "extra_config.lookup_limit_seconds",
            lookup,
            &LOOKUP_LIMIT_SECONDS,
        )?;
        check_number(
            "extra_config.lookup_hold_seconds",
            self.lookup_hold_seconds,
            &LOOKUP_HOLD_SECONDS,
        )?;
        check_number("extra_config.slow_limit_seconds", slow, &SLOW_LIMIT_SECONDS)?;
        if let Some(tokens) = self.min_load_tokens {
            check_whole("min_load_tokens", tokens, &MIN_LOAD_TOKENS)?;
        }
        check_number("low_watermark", self.low_watermark, &LOW_WATERMARK)?;
        if let Some(seconds) = self.ttl_seconds {
            check_number("ttl", seconds, &TTL_SECONDS)?;
        }
        if self.max_size == Some(0) {
            return Err(Error::config("max_size", 0, "1 byte or more"));
        }
        if let MinFree::Share(share) = self.min_free
            && !(0.0..1.0).contains(&share)
        {
            return Err(Error::config(
                "min_free",
                share,
                "a share of 0 or more and below 1",
            ));
        }
        check_paths(&self.gds_path)
            .map_err(|(value, expected)| Error::config("gds_path", value, expected))?;
        if let PathWeights::Listed(list) = &self.path_weights {
            list.iter()
                .try_for_each(|weight| check_number(PATH_WEIGHTS, *weight, &PATH_WEIGHT))?;
            if let Some(expected) = self.weights_expected() {
                return Err(Error::config(PATH_WEIGHTS, format!("{list:?}"), expected));
            }
        }
        Ok(())
    }

    /// Returns what the list of weights should be where it does not go with the directories.
    pub(super) fn weights_expected(&self) -> Option<String> {
        let paths = self.gds_path.len();
        match &self.path_weights {
            PathWeights::Listed(list) if list.len() != paths => Some(format!(
                "as many numbers as gds_path has directories ({paths})"
            )),
            _ => None,
        }
    }
}

/// Checks the list of directories; an error is the value to show and what was expected.
pub(super) fn check_paths(paths: &[PathBuf]) -> Result<(), (String, String)> {
    if paths.is_empty() {
        let expected = "an absolute directory, or several separated by commas";
        return Err(("nothing".to_owned(), expected.to_owned()));
    }
    for (index, path) in paths.iter().enumerate() {
        check_path(path).map_err(|expected| (format!("`{}`", path.display()), expected))?;
        if paths.iter().take(index).any(|earlier| earlier == path) {
            return Err((
                format!("`{}`", path.display()),
                "each directory only once".to_owned(),
            ));
        }
    }
    Ok(())
}

pub(super) fn check_path(path: &Path) -> Result<(), String> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err("a path without a zero byte".to_owned());
    }
    if path.is_absolute() {
        return Ok(());
    }
    let tilde = if path.starts_with("~") {
        "; `~` is not expanded"
    } else {
        ""
    };
    Err(format!("an absolute path, one that starts with `/`{tilde}"))
}

fn check_whole(key: &str, value: usize, range: &RangeInclusive<u64>) -> Result<()> {
    let inside = u64::try_from(value).is_ok_and(|value| range.contains(&value));
    if inside {
        Ok(())
    } else {
        Err(Error::config(key, value, super::value::span(range)))
    }
}

fn check_number(key: &str, value: f64, range: &RangeInclusive<f64>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let expected = format!("a number from {} to {}", range.start(), range.end());
    Err(Error::config(key, value, expected))
}
