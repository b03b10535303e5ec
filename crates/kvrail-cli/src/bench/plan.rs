//! What to measure.

use std::path::PathBuf;

use kvrail::config::EngineChoice;

use super::fio;
use super::geometry::Geometry;

/// Where the bytes of loads are beforehand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum LoadSource {
    /// On disk and not in the page cache.
    Disk,
    /// In the page cache.
    PageCache,
    /// In the DRAM tier of the store, of so many GB: the store's own, or one that processes share.
    Memory { gigabytes: f64, is_shared: bool },
}

impl LoadSource {
    /// Returns what reports call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::PageCache => "page cache",
            Self::Memory {
                is_shared: false, ..
            } => "memory",
            Self::Memory {
                is_shared: true, ..
            } => "shared memory",
        }
    }
}

/// What to measure of one geometry.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) chunks: usize,
    pub(crate) rounds: usize,
    pub(crate) threads: usize,
    /// One store for each, in the order of the report.
    pub(crate) engines: Vec<EngineChoice>,
    pub(crate) in_flight: usize,
    pub(crate) buffer_mib: usize,
    /// Bound of the source and the target together.
    pub(crate) memory_bytes: usize,
    pub(crate) load_source: LoadSource,
    /// Where memory that processes share lies, if loads come from that.
    pub(crate) shared_memory: Option<PathBuf>,
    /// Whether files are opened with O_DIRECT; `None`: where it works.
    pub(crate) direct: Option<bool>,
    /// Which share of the chunks is loaded while others are stored; nothing: that is not measured.
    pub(crate) mix: Option<f64>,
    /// Measured as well, if there is one.
    pub(crate) fio: Option<fio::Program>,
}

impl Plan {
    /// Returns the chunks that fit into half of the KV memory, at most all; 0 when none does.
    pub(crate) fn slots(&self) -> usize {
        // Half for what is stored, half for what is loaded.
        let fitting = self.memory_bytes / 2 / self.geometry.payload_bytes();
        fitting.min(self.chunks)
    }

    /// Returns the rounds that are not counted: one, and with a DRAM tier as many as touch all of
    /// its memory, since the system gives memory page by page, and slowly, when it is first used.
    pub(crate) fn warm_up_rounds(&self) -> usize {
        let LoadSource::Memory { gigabytes, .. } = self.load_source else {
            return 1;
        };
        let memory_bytes = (gigabytes * 1e9) as usize + (self.buffer_mib << 20);
        let round_bytes = self.chunks * self.geometry.payload_bytes();
        memory_bytes.div_ceil(round_bytes).max(1)
    }
}
