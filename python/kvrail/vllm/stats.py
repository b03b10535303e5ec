"""Counters of the connector, for vLLM's periodic log line and for ``/metrics``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

# The store's counters are read at most this often, except in steps that moved something.
POLL_SECONDS = 0.5

# Counter -> its documentation in /metrics, where it is called `kvrail:<counter>`. Counters of the
# scheduler are in tokens and requests, those of the store in chunks of one rank.
COUNTERS: dict[str, str] = {
    "requests_looked_up": "Requests whose prompt was looked up.",
    "hit_tokens": "Prompt tokens taken from the store.",
    "miss_tokens": "Prompt tokens in whole chunks that neither vLLM nor the store had.",
    "loads_declined": "Hits that were computed, as loading was not worth it (min_load_tokens).",
    "declined_tokens": "Tokens of these hits.",
    "lookup_timeouts": "Lookups that were not answered in time and count as misses.",
    "lookup_errors": "Lookups that failed and count as misses.",
    "lookups": "Lookups answered by the store.",
    "lookup_seconds": "Time spent in lookups, in seconds.",
    "chunks_looked_up": "Chunks that lookups asked for.",
    "chunks_found": "Chunks that lookups found on all ranks.",
    "chunks_loaded": "Chunks loaded and verified.",
    "bytes_loaded": "Payload bytes loaded.",
    "local_cpu_chunks_loaded": "Of these, chunks that were in host memory (local_cpu).",
    "local_cpu_bytes_loaded": "Payload bytes of those.",
    "local_cpu_inserts_failed": "Chunks that memory shared by processes had no room for.",
    "page_cache_bytes_loaded": "Bytes of files that loads took from the page cache.",
    "load_seconds": "Time spent in loads, in seconds, summed over chunks.",
    "chunks_assembled": "Chunks loaded that were put together from files of other head ranges.",
    "loads_failed": "Chunks that could not be loaded, for any reason.",
    "loads_refused_path_out": "Chunks not loaded because their path is left alone.",
    "loads_too_late": "Chunks not loaded because their turn came after 1.5 wait limits.",
    "chunks_missing": "Chunks that were gone when they were to be loaded.",
    "chunks_damaged": "Chunks that failed verification.",
    "chunks_set_aside": "Files of damaged chunks that were moved out of the way.",
    "bad_chunks_removed": "Files of damaged chunks that were removed, as they could not be moved.",
    "chunks_stored": "Chunks written.",
    "bytes_stored": "Payload bytes written.",
    "store_seconds": "Time spent in stores, in seconds, summed over chunks.",
    "chunks_already_present": "Chunks that were not written because they were there.",
    "stores_dropped_no_buffer": "Stores dropped because the staging memory was in use.",
    "stores_waited_for_slot": "Stores for whose VRAM slot the GPU's compute stream had to wait.",
    "stores_dropped_no_space": "Stores dropped because the file system was full.",
    "stores_dropped_path_unwell": "Stores dropped because their path fails or is read-only.",
    "stores_failed": "Stores that failed for another reason.",
    "cufile_chunks_stored": "Chunks that cuFile wrote.",
    "cufile_chunks_loaded": "Chunks that cuFile read.",
    "cufile_fallbacks": "Chunks that cuFile failed on and POSIX moved instead.",
    "cufile_mounts_downgraded": "Paths left to POSIX because cuFile failed while running.",
    "stores_dropped_blocks_reused": "Stores dropped because their blocks changed meanwhile.",
    "lookups_overdue": "Lookups that the store answered with nothing because they took too long.",
    "lookup_chunks_known": "Chunks of lookups that were known from an earlier one.",
    "paths_taken_out": "Times that a path was left alone: it hung, failed or was slow.",
    "paths_taken_back": "Times that a path was found well again.",
    "leftovers_removed": "Temporary files of writers that died, removed.",
    "stores_dropped_over_limit": "Stores dropped because max_size leaves no room.",
    "stores_dropped_not_admitted": "Stores dropped because the chunk was not used before.",
    "chunks_touched": "Chunks whose time of use was renewed.",
    "touches_failed": "Chunks whose time of use could not be set.",
    "chunks_evicted_size": "Chunks removed by this process for max_size.",
    "chunks_evicted_space": "Chunks removed by this process for min_free.",
    "chunks_evicted_age": "Chunks removed by this process for ttl.",
    "bytes_evicted": "File bytes of the chunks removed by this process.",
    "uring_requests_continued": "io_uring requests that moved a part first and then the rest.",
    "uring_requests_handed_over": "io_uring requests that a kernel thread had to do.",
    "uring_requests_cancelled": "io_uring requests that nobody waited for any more.",
    "uring_requests_leaked": "io_uring requests whose memory was left to the kernel for good.",
}

# Gauge -> its documentation. Not increments: the latest value counts, and of several workers the
# highest, since all see the same directories.
GAUGES: dict[str, str] = {
    "usage_bytes": "Bytes of all chunks on all paths, of all instances; 0 before they are known.",
    "local_cpu_bytes": "Bytes of host memory that hold chunks (local_cpu), of the fullest worker.",
    "load_tokens_per_second": "Tokens loaded per second of a load, over the latest loads.",
    "prefill_tokens_per_second": "Tokens computed per second, over the latest prefill steps.",
    "janitor_paths": "Paths of which a worker of this engine is the janitor.",
    "uring_requests_held": "io_uring requests that nobody waits for and the kernel still has.",
}

METRIC_PREFIX = "kvrail:"

# Shown in the log line even when 0 would be the more common value; all others only when they moved.
_LOG_ALWAYS = ("hit_tokens", "miss_tokens")


@dataclass
class KvrailStats(KVConnectorStats):
    """Increments of counters since the last report, and gauges; ``data`` maps name to amount."""

    def reset(self) -> None:
        """Clears all counters."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds the increments of another worker, side or interval."""
        for name, amount in other.data.items():
            known = self.data.get(name, 0.0)
            self.data[name] = max(known, amount) if name in GAUGES else known + amount
        return self

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        """The log line: counters that moved, sizes in MB, rates in GB/s of one I/O thread."""
        values: dict[str, int | float] = {name: int(self.data.get(name, 0)) for name in _LOG_ALWAYS}
        for name in COUNTERS:
            amount = self.data.get(name, 0.0)
            if not amount or name in values or name.endswith("_seconds"):
                continue
            if name.startswith("bytes_"):
                values[f"MB_{name.removeprefix('bytes_')}"] = round(amount / 1e6, 1)
            else:
                values[name] = int(amount)
        for verb, seconds in (("loaded", "load_seconds"), ("stored", "store_seconds")):
            moved, spent = self.data.get(f"bytes_{verb}", 0.0), self.data.get(seconds, 0.0)
            if moved and spent:
                values[f"GB_per_second_{verb}"] = round(moved / spent / 1e9, 2)
        return values


class StatsCollector:
    """Turns running totals into increments, without looking at them in every step."""

    def __init__(self) -> None:
        self._totals: Callable[[], Mapping[str, float]] | None = None
        self._seen: dict[str, float] = {}
        self._due_at = 0.0

    def follow(self, totals: Callable[[], Mapping[str, float]]) -> None:
        """Reads the totals of a store from now on."""
        self._totals = totals
        self._seen = {}

    def unfollow(self) -> None:
        """Reads no totals any more."""
        self._totals = None

    def touch(self) -> None:
        """Notes that something happened that the next report should show."""
        self._due_at = -math.inf

    def due(self, now: float) -> bool:
        """Whether it is time to look at the totals, by a monotonic clock in seconds."""
        # Asked in every step, and hardly ever true.
        return now >= self._due_at and self._totals is not None

    def take(self, extra: Mapping[str, float] | None = None) -> KvrailStats | None:
        """The increments since the last call plus `extra`; None when there are none."""
        self._due_at = time.monotonic() + POLL_SECONDS
        data = dict(extra) if extra else {}
        if self._totals is not None:
            totals = self._totals()
            # Most often nothing moved, and one comparison is quicker than one for each name.
            if totals != self._seen:
                self._add_increments(totals, data)
        return KvrailStats(data=data) if data else None

    def _add_increments(self, totals: Mapping[str, float], data: dict[str, float]) -> None:
        for name, total in totals.items():
            # All names are kept, also those that stay at 0, or the two would never be the same.
            seen = self._seen.setdefault(name, 0.0)
            if name in GAUGES:
                if total != seen:
                    self._seen[name] = data[name] = total
            elif total > seen:
                self._seen[name] = total
                data[name] = data.get(name, 0.0) + (total - seen)


class KvrailPromMetrics(KVConnectorPromMetrics):
    """The counters in vLLM's ``/metrics``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_metrics()

        def of_kind(kind: type, documented: dict[str, str]) -> dict[str, dict[int, Any]]:
            return {
                name: create_metric_per_engine(
                    metric_types[kind](
                        name=f"{METRIC_PREFIX}{name}",
                        documentation=documentation,
                        labelnames=labelnames,
                    ),
                    per_engine_labelvalues,
                )
                for name, documentation in documented.items()
            }

        self._counters = of_kind(Counter, COUNTERS)
        self._gauges = of_kind(Gauge, GAUGES)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds the increments of one report, and sets its gauges."""
        for name, amount in transfer_stats_data.items():
            counters = self._counters.get(name)
            if counters is not None:
                counters[engine_idx].inc(amount)
            elif name in self._gauges:
                self._gauges[name][engine_idx].set(amount)


def _forget_metrics() -> None:
    """Removes the metrics of an earlier engine in this process, as vLLM does with its own.

    Prometheus refuses a name twice, so a second engine could not start without this.
    """
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith(METRIC_PREFIX):
            REGISTRY.unregister(collector)
