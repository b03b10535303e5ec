//! What settings choose between.

/// How chunks are spread when `gds_path` names several directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PathSharding {
    /// By a hash of the chunk key: every instance finds every chunk.
    #[default]
    ByHash,
    /// By the GPU's index: each rank keeps to one directory, as LMCache does.
    ByGpu,
}

/// Which I/O engine the user asks for when files can be read straight into GPU memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GdsBackend {
    /// NVIDIA's cuFile.
    #[default]
    Cufile,
    /// POSIX reads and writes through staging buffers.
    Posix,
}

/// What moves bytes between files and staging memory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EngineChoice {
    /// What measures best on each file system.
    #[default]
    Auto,
    /// System calls on a pool of threads.
    Posix,
    /// io_uring, where it can be used.
    Uring,
}

/// What loads and stores have to do with the system's page cache, where files are opened direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PageCache {
    /// Loads take from it what is there; stores leave nothing in it.
    #[default]
    Auto,
    /// Loads take from it what is there; stores leave in it what they write.
    Keep,
    /// Neither loads nor stores touch it.
    Bypass,
}

/// How large a share of the chunks each of several directories gets.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum PathWeights {
    /// By the bandwidth that was measured and recorded when a directory was first one of several.
    #[default]
    Measured,
    /// All get the same.
    Equal,
    /// By these numbers, one for each directory in the order of `gds_path`.
    Listed(Vec<f64>),
}

/// Whose directory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DirectoryLayout {
    /// kvrail's own: namespaces, and files with checksums.
    #[default]
    Kvrail,
    /// That of LMCache's `GdsBackend`, which LMCache may read and write at the same time.
    Lmcache,
}

/// What chunk keys are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ChunkHashing {
    /// vLLM's own hashes of its blocks.
    #[default]
    Vllm,
    /// LMCache's hashes of its chunks.
    Lmcache,
}

/// LMCache's algorithms for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LmcacheHash {
    /// Python's own `hash`: numbers with a sign.
    #[default]
    Builtin,
    /// SHA-256 of the pickled form.
    Sha256,
    /// SHA-256 of the CBOR form.
    Sha256Cbor,
    /// XXH3-128 of the pickled form.
    Xxhash,
    /// XXH3-128 of the CBOR form.
    XxhashCbor,
}

impl LmcacheHash {
    /// Returns the name that LMCache has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Builtin => "builtin",
            Self::Sha256 => "sha256",
            Self::Sha256Cbor => "sha256_cbor",
            Self::Xxhash => "xxhash",
            Self::XxhashCbor => "xxhash_cbor",
        }
    }
}

/// What a published chunk survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Durability {
    /// The end of the process; after a power failure, chunks may be missing or fail their checksum.
    #[default]
    None,
    /// A power failure: file and directory are synced before a chunk becomes visible.
    Full,
}

/// What the connector does about blocks that could not be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LoadFailurePolicy {
    /// Has vLLM compute them: a failed load is a miss.
    #[default]
    Recompute,
    /// Lets the request fail, for those who want to notice.
    Fail,
}

/// Which chunks go first when there is too little room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EvictionPolicy {
    /// Those that were not used for the longest time.
    #[default]
    Lru,
    /// The same, where a chunk that was used again counts as younger: half its age after one use,
    /// a quarter after two, an eighth after three or more.
    Reuse,
}

/// Which chunks are stored while eviction has to make room for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Admission {
    /// All.
    #[default]
    All,
    /// Those that this process was given to store before: what is used once is never written.
    SecondUse,
}

/// How much of a file system stays free.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MinFree {
    /// A share of the file system's size, 0 or more and below 1.
    Share(f64),
    /// A number of bytes.
    Bytes(u64),
}

impl Default for MinFree {
    fn default() -> Self {
        Self::Share(0.05)
    }
}
