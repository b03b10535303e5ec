"""``KvrailConnector``: the class that vLLM makes once per scheduler and once per worker.

It only decides which side a hook belongs to: ``scheduler_side.py`` or ``worker.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvrail.vllm import layout, plugin, version
from kvrail.vllm.config import resolve_config, with_fitting_chunks
from kvrail.vllm.direct import in_place_problem, wanted_layout
from kvrail.vllm.failure_policy import compute_what_fails
from kvrail.vllm.loaded_weights import LoadedWeights
from kvrail.vllm.metadata import KvrailMetadata, KvrailWorkerMetadata
from kvrail.vllm.outer import outer_connectors
from kvrail.vllm.scheduler_side import SchedulerSide
from kvrail.vllm.stats import KvrailPromMetrics, KvrailStats
from kvrail.vllm.worker import ConnectorWorker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KvrailConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV cache in files."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        version.check(vllm_version)
        super().__init__(vllm_config, role, kv_cache_config)
        settings = self._kv_transfer_config.kv_connector_extra_config
        self._config = with_fitting_chunks(
            resolve_config(settings),
            settings,
            lambda size: layout.fitting_chunk_size(
                size, kv_cache_config, vllm_config.parallel_config.decode_context_parallel_size
            ),
        )
        self._worker: ConnectorWorker | None = None
        self._scheduler: SchedulerSide | None = None
        # vLLM hands what the workers of one connector say to all of them, and some refuse others'.
        self._is_inner = bool(outer_connectors(self))
        if role is KVConnectorRole.WORKER:
            self._worker = ConnectorWorker(
                weights=LoadedWeights.of_maker(), sends_handshake=self._is_inner
            )
        else:
            if self._config.load_failure_policy != "fail":
                compute_what_fails(self)
            self._scheduler = SchedulerSide(
                self._config, vllm_config, kv_cache_config, awaits_workers=self._is_inner
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Asks for whole blocks where files and GPU memory may have a direct way; see direct.py."""
        from vllm.platforms import current_platform

        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        config = resolve_config(transfer.kv_connector_extra_config)
        problem = in_place_problem(vllm_config.model_config)
        return wanted_layout(config, current_platform.is_cuda(), problem)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may lose a store; nobody waits for it."""
        return False

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        self._worker.register_kv_caches(
            self._config, self._vllm_config, self._kv_cache_config, kv_caches
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        assert self._worker is not None
        return None if self._is_inner else self._worker.handshake()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_loads(self._step_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps, before vLLM schedules the request; no layer waits."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Stores take whole chunks over all layers after the forward, not layer by layer."""

    def wait_for_save(self) -> None:
        assert self._worker is not None
        self._worker.submit_stores(self._step_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        metadata = self._step_metadata() if self.has_connector_metadata() else None
        return None, self._worker.take_finished_loads(metadata) or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        _, finished = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(
            finished_recving=finished or set(),
            failed_recving=self._worker.take_failed_requests(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self._worker is not None
        return self._worker.take_worker_metadata()

    def _step_metadata(self) -> KvrailMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvrailMetadata)
        return metadata

    # Scheduler side.

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        assert self._scheduler is not None
        self._scheduler.weights.follow(gpu_block_pool)

    def reset_cache(self) -> bool:
        """Has kvrail look at vLLM's weights again, and use what was stored with the same ones.

        vLLM resets its connectors' caches when its weights may change, by sleep mode or a trainer,
        and when somebody asks for it. Files are not removed: they are other instances', too.
        """
        assert self._scheduler is not None
        self._scheduler.requests.weights_may_have_changed()
        return True

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        assert self._scheduler is not None
        if not self._is_inner:
            self._scheduler.connect(metadata)

    def on_new_request(self, request: Request) -> None:
        assert self._scheduler is not None
        self._scheduler.requests.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        if self._scheduler.awaits_workers():
            return None, False
        return self._scheduler.requests.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.requests.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.requests.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self._scheduler is not None
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, KvrailWorkerMetadata) and metadata.handshakes:
            self._scheduler.take_handshakes(metadata.handshakes)
        self._scheduler.requests.update_connector_output(
            connector_output.kv_connector_worker_meta, connector_output.finished_recving or ()
        )

    def take_events(self) -> Iterable[KVCacheEvent]:
        assert self._scheduler is not None
        return self._scheduler.take_events()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        explanation = self._scheduler.requests.explanation(request)
        self._scheduler.requests.request_finished(request.request_id)
        return False, explanation

    # Both sides.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is not None:
            return self._worker.take_stats()
        assert self._scheduler is not None
        # vLLM asks once for each step, when its output was processed.
        self._scheduler.requests.step_ended()
        return self._scheduler.take_stats()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return KvrailStats(data=dict(data) if data else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return KvrailPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


plugin.make_name_known()
