"""The scheduler's half of a connector: the request logic and the store that answers its lookups.

It is set up when the scheduler is made, and works once all workers have said what they have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

from kvrail import STARTUP_CPUS
from kvrail._core import Config, ConfigError, KvrailError
from kvrail.vllm import layout
from kvrail.vllm.config import effective_value
from kvrail.vllm.events import StorageEvents
from kvrail.vllm.fingerprint import AdapterFingerprints
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.identity import engine_none_hash
from kvrail.vllm.lmcache_hash import LmcacheHasher
from kvrail.vllm.lookup import Agreement, DisagreementError, LookupStore, agree
from kvrail.vllm.multimodal import items_are_named
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions
from kvrail.vllm.stats import StatsCollector
from kvrail.vllm.weights_watch import WeightsWatch
from kvrail.vllm.worker import CLOSE_LIMIT_SECONDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(f"vllm.{__name__}")


class SchedulerSide:
    """The request logic together with the store that answers its lookups."""

    def __init__(
        self,
        config: Config,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        *,
        awaits_workers: bool = False,
    ) -> None:
        self._config = config
        self._awaits_workers = awaits_workers
        self._awaits_since: float | None = None
        self._handshakes: dict[tuple[int, int], KVConnectorHandshakeMetadata] = {}
        parallel = vllm_config.parallel_config
        self._workers = parallel.pipeline_parallel_size * parallel.tensor_parallel_size
        self._store: LookupStore | None = None
        self._stats = StatsCollector()
        events = vllm_config.kv_events_config
        self._publishes_events = events is not None and events.enable_kv_cache_events
        self._events: StorageEvents | None = None
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        options = SchedulerOptions(
            may_load=transfer.is_kv_consumer,
            may_store=transfer.is_kv_producer,
            save_decode_cache=config.save_decode_cache,
            wait_limit_seconds=float(effective_value(config, "extra_config.wait_limit_seconds")),
            min_load_tokens=effective_value(config, "min_load_tokens"),
            max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            # Of such engines each computes something in every step, or all of them wait for it.
            waits_when_idle=not (
                parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe
            ),
            items_are_named=items_are_named(vllm_config),
        )
        self._wait_limit_seconds = options.wait_limit_seconds
        self._misfit: str | None = None
        geometry = ChunkGeometry(config.chunk_size, config.chunk_size, config.chunk_size)
        try:
            geometry = layout.chunk_geometry(
                layout.select_groups(
                    kv_cache_config, config.chunk_size, parallel.decode_context_parallel_size
                ),
                config.chunk_size,
                *resolve_kv_cache_block_sizes(kv_cache_config, vllm_config),
            )
        except (layout.UnsupportedModelError, ConfigError, ValueError) as error:
            # The workers have said so already, and nothing will be asked of this geometry.
            self._misfit = str(error)
        self._hasher: LmcacheHasher | None = None
        try:
            if config.lmcache_hash is not None:
                self._hasher = LmcacheHasher.of_process(config.lmcache_hash)
        except layout.UnsupportedModelError as error:
            self._misfit = str(error)
        self.weights = WeightsWatch(
            workers=self._workers,
            wait_limit_seconds=options.wait_limit_seconds,
            clock=time.monotonic,
            changeable=self._hasher is None,
        )
        self.requests = ConnectorScheduler(
            geometry,
            options,
            self.weights,
            adapter_fingerprint=AdapterFingerprints().of,
            hasher=self._hasher,
        )

    def awaits_workers(self) -> bool:
        """Whether the workers are still to say what they have; asked of a request that would wait.

        Only of a connector inside another one, whose workers say it with the first step.
        """
        if not self._awaits_workers:
            return False
        now = time.monotonic()
        if self._awaits_since is None:
            self._awaits_since = now
        return now - self._awaits_since <= self._wait_limit_seconds

    def take_handshakes(
        self, handshakes: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Takes what workers said with a step; connects when all have."""
        self._handshakes.update(handshakes)
        if not self._awaits_workers or len(self._handshakes) < self._workers:
            return
        self._awaits_workers = False
        try:
            self.connect(self._handshakes)
        except KvrailError as error:
            # vLLM serves already: too late to end its start.
            logger.error("kvrail: nothing is stored or loaded: %s", error)

    def connect(self, handshakes: dict[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """Opens the store for lookups when all workers agree; otherwise nothing is stored."""
        try:
            agreement = agree(handshakes, self._workers)
        except DisagreementError as error:
            logger.error("kvrail: nothing is stored or loaded: %s", error)
            return
        if isinstance(agreement, str):
            # The worker has logged it.
            return
        if self._misfit is not None:
            logger.error("kvrail: nothing is stored or loaded: %s", self._misfit)
            return
        try:
            groups = self.requests.geometry.groups
            self._store = LookupStore(self._config, agreement, STARTUP_CPUS, groups)
        except ConfigError:
            raise
        except KvrailError as error:
            logger.error("kvrail: nothing is stored or loaded: %s", error)
            return
        self._stats.follow(self._store.store.metrics)
        if self._publishes_events:
            self._events = StorageEvents(
                self.requests.geometry, [len(parts) for parts in agreement.parts]
            )
        self.requests.enable(
            self._store.lookup,
            lambda: _hash_problem(agreement, self._hasher),
            events=self._events,
        )

    def take_stats(self) -> KVConnectorStats | None:
        counters = self.requests.take_counters()
        if not counters and not self._stats.due(time.monotonic()):
            return None
        if self._store is not None:
            for level, message in self._store.store.take_notices():
                logger.log(
                    logging.WARNING if level == "warning" else logging.INFO, "kvrail: %s", message
                )
        return self._stats.take(counters)

    def take_events(self) -> list[KVCacheEvent]:
        return [] if self._events is None else self._events.take()

    def shutdown(self) -> None:
        self.requests.disable()
        self._stats.unfollow()
        store, self._store = self._store, None
        if store is None:
            return
        try:
            store.store.close(CLOSE_LIMIT_SECONDS)
        except KvrailError as error:
            logger.warning("kvrail: closing the store: %s", error)


def _hash_problem(agreement: Agreement, hasher: LmcacheHasher | None) -> str | None:
    """Why this engine's hashes are not those of the namespace, or None.

    vLLM starts its hash chains after the connectors were made, so this is asked with the first
    request.
    """
    found = engine_none_hash() if hasher is None else hasher.start_key.hex()
    whose = "vLLM's prefix hashes" if hasher is None else "LMCache's hashes"
    if found == agreement.none_hash:
        return None
    return (
        f"{whose} start from {found}, its workers expected {agreement.none_hash}; set "
        "PYTHONHASHSEED to the same number for all processes"
    )
