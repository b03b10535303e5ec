//! Counters of a store, as plain values; exporting them is the caller's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::io::IoCounts;

/// A counter that many threads add to.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(super) fn add_duration(&self, duration: Duration) {
        self.add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(super) fn set(&self, amount: u64) {
        self.0.store(amount, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn seconds(&self) -> f64 {
        Duration::from_nanos(self.get()).as_secs_f64()
    }
}

macro_rules! metrics {
    (counts { $($(#[$count_doc:meta])* $count:ident,)* }
     seconds { $($(#[$seconds_doc:meta])* $seconds:ident,)* }
     gauges { $($(#[$gauge_doc:meta])* $gauge:ident,)* }) => {
        /// What a store counts while it runs.
        #[derive(Debug, Default)]
        pub(super) struct Metrics {
            $(pub(super) $count: Counter,)*
            $(pub(super) $seconds: Counter,)*
            $(pub(super) $gauge: Counter,)*
        }

        /// All counters of a store at one moment. They only grow, but for the gauges at the end.
        #[derive(Debug, Clone, Copy, PartialEq, Serialize)]
        pub struct MetricsSnapshot {
            $($(#[$count_doc])* pub $count: u64,)*
            $($(#[$seconds_doc])* pub $seconds: f64,)*
            $($(#[$gauge_doc])* pub $gauge: u64,)*
        }

        impl Metrics {
            pub(super) fn snapshot(&self) -> MetricsSnapshot {
                MetricsSnapshot {
                    $($count: self.$count.get(),)*
                    $($seconds: self.$seconds.seconds(),)*
                    $($gauge: self.$gauge.get(),)*
                }
            }
        }
    };
}

metrics! {
    counts {
        /// Chunks written and published.
        chunks_stored,
        /// Payload bytes of those.
        bytes_stored,
        /// Chunks not written because they are there already.
        chunks_already_present,
        /// Stores given up because no staging buffer was free.
        stores_dropped_no_buffer,
        /// Stores behind which the GPU's compute stream waits until a VRAM slot is free.
        stores_waited_for_slot,
        /// Stores given up because the file system has too little space left.
        stores_dropped_no_space,
        /// Stores given up while a path that failed is left alone, or is read-only.
        stores_dropped_path_unwell,
        /// Stores that failed with an error.
        stores_failed,
        /// Chunks read, verified and copied to the KV cache.
        chunks_loaded,
        /// Payload bytes of those.
        bytes_loaded,
        /// Of these, chunks that were in host memory (`local_cpu`).
        local_cpu_chunks_loaded,
        /// Payload bytes of those.
        local_cpu_bytes_loaded,
        /// Chunks that the memory shared by processes (`local_cpu_shared`) had no room for.
        local_cpu_inserts_failed,
        /// Bytes of files that loads took from the page cache, where files are opened direct.
        page_cache_bytes_loaded,
        /// Chunks loaded that were put together from files of other ranges of heads.
        chunks_assembled,
        /// Loads of chunks that gave nothing, for any reason: missing, damaged, error, time.
        loads_failed,
        /// Of those: chunks that were not tried because their path is left alone.
        loads_refused_path_out,
        /// Of those: chunks whose turn came only after one and a half wait limits.
        loads_too_late,
        /// Of those: chunks that were gone when they were to be loaded.
        chunks_missing,
        /// Of those: chunks whose bytes are not what was stored.
        chunks_damaged,
        /// Files set aside because they are damaged.
        chunks_set_aside,
        /// Chunks that cuFile wrote.
        cufile_chunks_stored,
        /// Chunks that cuFile read.
        cufile_chunks_loaded,
        /// Chunks that cuFile failed on and POSIX moved instead.
        cufile_fallbacks,
        /// Paths that are left to POSIX because cuFile failed while running.
        cufile_mounts_downgraded,
        /// Stores given up because their blocks changed while cuFile wrote them in place.
        stores_dropped_blocks_reused,
        /// Damaged files removed because they could not be set aside.
        bad_chunks_removed,
        /// Lookups answered.
        lookups,
        /// Chunks that lookups asked for.
        chunks_looked_up,
        /// Chunks of those that are part of the prefix found.
        chunks_found,
        /// Lookups answered with "nothing there" because they took too long.
        lookups_overdue,
        /// Chunks of lookups that were known from an earlier one.
        lookup_chunks_known,
        /// Times that a path was taken out of use: it did not answer, failed or was slow.
        paths_taken_out,
        /// Times that a path was found well again and taken back into use.
        paths_taken_back,
        /// Leftover temp files removed.
        leftovers_removed,
        /// Stores given up because `max_size` leaves no room; part of those for want of space.
        stores_dropped_over_limit,
        /// Stores given up because the chunk was not used before, and room is short.
        stores_dropped_not_admitted,
        /// Chunks whose time of use was renewed.
        chunks_touched,
        /// Chunks whose time of use could not be set.
        touches_failed,
        /// Chunks that this process removed because the directory held too much.
        chunks_evicted_size,
        /// Chunks that this process removed because the file system had too little free space.
        chunks_evicted_space,
        /// Chunks that this process removed because they were not used for too long.
        chunks_evicted_age,
        /// File bytes of all those.
        bytes_evicted,
        /// Requests of io_uring that were asked to go on, because a part only had been moved.
        uring_requests_continued,
        /// Requests of io_uring that the file system could not do without waiting.
        uring_requests_handed_over,
        /// Requests of io_uring that nobody waited for any more, and that were cancelled.
        uring_requests_cancelled,
        /// Requests of io_uring whose memory was left to the kernel for good.
        uring_requests_leaked,
    }
    seconds {
        /// Time from the first to the last step of each store, summed over chunks.
        store_seconds,
        /// Time from the first to the last step of each load, summed over chunks.
        load_seconds,
        /// Time from submitting to answering each lookup, summed.
        lookup_seconds,
    }
    gauges {
        /// Bytes in use on all paths, by all instances; 0 before they are known.
        usage_bytes,
        /// Bytes of host memory that hold chunks in front of the files (`local_cpu`); with
        /// `local_cpu_shared` those of all processes together.
        local_cpu_bytes,
        /// Paths of which this process is the janitor.
        janitor_paths,
        /// Requests of io_uring that nobody waits for and that the kernel still has.
        uring_requests_held,
    }
}

impl Metrics {
    /// Takes over what the I/O engines have counted.
    pub(super) fn set_io(&self, counts: &IoCounts) {
        self.uring_requests_continued.set(counts.continued);
        self.uring_requests_handed_over.set(counts.handed_over);
        self.uring_requests_cancelled.set(counts.cancelled);
        self.uring_requests_leaked.set(counts.leaked);
        self.uring_requests_held.set(counts.held);
        self.page_cache_bytes_loaded.set(counts.from_page_cache);
    }
}
