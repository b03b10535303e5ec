"""The worker side of the connector: moves what the scheduler side planned.

Loads run in the background and are polled once per step. Stores copy the blocks into staging memory
before ``submit_stores`` returns and are written in the background, so vLLM may reuse a block as
soon as the step is over. For the same reason nothing has to be done when vLLM preempts a request.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvrail._core import (
    Config,
    DamagedError,
    KvCache,
    KvrailError,
    MismatchError,
    Store,
    StoreTicket,
)
from kvrail.vllm.attachment import attach
from kvrail.vllm.identity import model_name
from kvrail.vllm.layout import UnsupportedModelError
from kvrail.vllm.loaded_weights import LoadedWeights, WeightsReport
from kvrail.vllm.loading import Loading, Reports
from kvrail.vllm.metadata import (
    GroupStore,
    KvrailHandshake,
    KvrailMetadata,
    KvrailWorkerMetadata,
    Part,
    RequestLoad,
    StoreChunk,
)
from kvrail.vllm.stats import StatsCollector
from kvrail.vllm.worker_rank import WorkerRank

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvrail.vllm.stats import KvrailStats

logger = logging.getLogger(f"vllm.{__name__}")

# A step without work for the model would be repeated at once; waiting here spares the spinning.
IDLE_WAIT_SECONDS = 0.002
# vLLM kills its workers a few seconds after it asked them to end. Stores that are not written by
# then are lost, which costs a miss later and nothing else.
CLOSE_LIMIT_SECONDS = 3.0
# Stores that are watched for KV events; of more at a time the oldest are not announced.
MAX_STORING = 16_384


class ConnectorWorker:
    """One worker's store, its attached KV cache and the loads under way."""

    def __init__(
        self,
        open_store: Callable[..., Store] = Store,
        weights: LoadedWeights | None = None,
        *,
        sends_handshake: bool = False,
    ) -> None:
        self._open_store = open_store
        self._sends_handshake = sends_handshake
        self._unsent: dict[tuple[int, int], KvrailHandshake] = {}
        self._weights = weights
        self._weights_reports: dict[tuple[int, int], WeightsReport] = {}
        self._rank = 0
        self._store: Store | None = None
        self._kv_caches: tuple[KvCache, ...] = ()
        self._fails_by_block = True
        self._device = "cpu"
        self._stored_groups: Container[int] = range(sys.maxsize)
        self._announces = False
        self._storing: deque[tuple[tuple[int, bytes], StoreTicket]] = deque(maxlen=MAX_STORING)
        self._loading: dict[str, Loading] = {}
        self._settled: list[tuple[RequestLoad, Reports]] = []
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._failures: dict[str, tuple[bytes, ...]] = {}
        self._reported: set[str] = set()
        self._stats = StatsCollector()
        self._handshake: KvrailHandshake | None = None

    # Start and end.

    def register_kv_caches(
        self,
        config: Config,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        kv_caches: dict[str, Any],
    ) -> None:
        """Opens the store and attaches this worker's KV cache to it.

        A model that cannot be stored is served without kvrail, and the log says why. A
        configuration that cannot work raises a ``KvrailError``, which ends vLLM's start.
        """
        rank = WorkerRank.current(vllm_config, kv_cache_config)
        self._rank = rank.global_rank
        events = vllm_config.kv_events_config
        self._announces = events is not None and events.enable_kv_cache_events
        reason = None
        identity_json = ""
        parts: tuple[Part, ...] = ()
        try:
            attached = attach(
                self._open_store, config, vllm_config, kv_cache_config, kv_caches, rank
            )
        except (UnsupportedModelError, MismatchError, DamagedError) as error:
            reason = str(error)
            if rank.global_rank == 0:
                logger.warning("kvrail: nothing is stored or loaded: %s", reason)
        else:
            identity_json, parts = attached.identity_json, attached.parts
            self._stored_groups = attached.stored_groups
            self.adopt(
                attached.store,
                attached.kv_caches,
                attached.device,
                fails_by_block=attached.fails_by_block,
            )
            self._log_notices()
        self._handshake = KvrailHandshake(
            model=model_name(vllm_config),
            identity_json=identity_json,
            parts=parts,
            world_size=rank.world_size,
            reason=reason,
        )
        if self._sends_handshake:
            self._unsent[rank.stage, rank.tensor_rank] = self._handshake

    def adopt(
        self,
        store: Store,
        kv_caches: Sequence[KvCache],
        device: str = "cpu",
        *,
        fails_by_block: bool = True,
    ) -> None:
        """Works with an open store and the KV cache on ``device`` attached to it, by groups.

        ``fails_by_block`` says that vLLM can go on from any block that failed to load: with one
        group, of which all blocks before that one were loaded.
        """
        self._store = store
        self._device = device
        self._kv_caches = tuple(kv_caches)
        self._fails_by_block = fails_by_block
        self._stats.follow(store.metrics)

    def handshake(self) -> KvrailHandshake | None:
        """What the scheduler side needs to know; None before the KV cache was registered."""
        return self._handshake

    def shutdown(self) -> None:
        """Closes the store; stores under way get a few seconds."""
        store, self._store, self._kv_caches = self._store, None, ()
        if store is None:
            return
        self._stats.unfollow()
        try:
            store.close(CLOSE_LIMIT_SECONDS)
        except KvrailError as error:
            logger.warning("kvrail: closing the store: %s", error)

    # Hooks of one step, in their order.

    def start_loads(self, metadata: KvrailMetadata) -> None:
        """Submits this step's loads, and looks at the weights where the scheduler side asks."""
        if metadata.weights_question is not None:
            self._look_at_weights(metadata.weights_question)
        for load in metadata.loads:
            self._stats.touch()
            # Whatever was submitted is waited for: it may still write to the request's blocks.
            loading = Loading(load, [None] * len(load.parts))
            for place, part in enumerate(load.parts):
                if not self._kv_caches:
                    break
                try:
                    ticket = self._kv_caches[part.group].load(part.chunks, **self._in_order())
                except KvrailError as error:
                    self._report("load", error)
                    break
                loading.tickets[place] = ticket
            if loading.is_over:
                self._settled.append((load, loading.reports))
            else:
                self._loading[load.request_id] = loading

    def submit_stores(self, metadata: KvrailMetadata) -> None:
        """Copies this step's chunks into staging memory; they are written in the background.

        On a GPU the copy is put on the compute stream and this returns at once.
        """
        if not metadata.stores or not self._kv_caches:
            return
        self._stats.touch()
        try:
            order = self._in_order()
            parts = [part for part in metadata.stores if part.group in self._stored_groups]
            if len(parts) == 1 and not self._announces:
                self._kv_caches[parts[0].group].store(parts[0].chunks, **order)
                return
            for group, chunk in _chunk_by_chunk(parts):
                ticket = self._kv_caches[group].store((chunk,), **order)
                # A ticket counts; which chunk it is about is known when it is about one.
                if self._announces:
                    self._storing.append(((group, chunk.key), ticket))
        except KvrailError as error:
            self._report("store", error)

    def _in_order(self) -> dict[str, int]:
        """On a GPU, the stream that transfers are ordered with: the one that computes.

        vLLM runs ahead of the GPU. A forward on the stream may still write to blocks that a load is
        given now, and the next forward may overwrite blocks that a store is to read.
        """
        return {} if self._device == "cpu" else {"stream": _current_stream(self._device)}

    def take_finished_loads(self, metadata: KvrailMetadata | None) -> set[str]:
        """Requests whose loads ended, well or not; failed blocks are known from here on."""
        if not self._loading and not self._settled:
            return set()
        self._poll_loads()
        if not self._settled and metadata is not None and metadata.may_wait:
            self._wait_for_a_load()
        settled, self._settled = self._settled, []
        for load, reports in settled:
            self._stats.touch()
            self._note_failures(load, reports)
        return {load.request_id for load, _ in settled}

    def take_failed_requests(self) -> set[str]:
        """Requests whose load failed, of a model with several KV cache groups or with a window.

        vLLM computes such a request from its start (``_handle_failed_recving`` of its scheduler):
        it cannot tell from block ids where each group stands, and before a block that failed a
        window was not loaded, so that computing on from there would see blocks of nothing.
        """
        if not self._failed_requests:
            return set()
        requests, self._failed_requests = self._failed_requests, set()
        return requests

    def take_failed_blocks(self) -> set[int]:
        """Blocks that hold nothing because their load failed; vLLM computes them instead.

        Only of a model with one KV cache group that looks at all tokens.
        """
        if not self._failed_blocks:
            return set()
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def take_stats(self) -> KvrailStats | None:
        """What the store counted since the last call; also hands the store's notices to the log."""
        if not self._stats.due(time.monotonic()):
            return None
        self._log_notices()
        return self._stats.take()

    def take_worker_metadata(self) -> KvrailWorkerMetadata | None:
        """What this step showed, for the scheduler side."""
        if not (self._failures or self._storing or self._weights_reports or self._unsent):
            return None
        failures, self._failures = self._failures, {}
        stored = self._take_stored()
        weights, self._weights_reports = self._weights_reports, {}
        handshakes, self._unsent = self._unsent, {}
        if not (failures or stored or weights or handshakes):
            return None
        return KvrailWorkerMetadata(failures, stored, weights, handshakes)

    def _take_stored(self) -> dict[tuple[int, bytes], int]:
        """The chunks that are published by now, in the order in which they were handed over."""
        stored = {}
        while self._storing:
            place, ticket = self._storing[0]
            report = ticket.poll()
            if report is None:
                break
            self._storing.popleft()
            # What was there already may be believed only: a store does not look for what it stored
            # itself a moment ago. Whoever stored it has announced it.
            if report.stored:
                stored[place] = 1
        return stored

    def _look_at_weights(self, question: int) -> None:
        """In the first step after the question came up, before anything of a later one."""
        if self._weights is None:
            report = WeightsReport("", False, "no way to the weights in memory")
        else:
            report = self._weights.report()
        self._weights_reports[question, self._rank] = report

    # Loads.

    def _poll_loads(self) -> None:
        for loading in list(self._loading.values()):
            loading.poll(self._report)
            self._settle_if_over(loading)

    def _wait_for_a_load(self) -> None:
        loading = next(iter(self._loading.values()))
        loading.wait(IDLE_WAIT_SECONDS, self._report)
        self._settle_if_over(loading)

    def _settle_if_over(self, loading: Loading) -> None:
        if loading.is_over:
            del self._loading[loading.load.request_id]
            self._settled.append((loading.load, loading.reports))

    def _note_failures(self, load: RequestLoad, reports: Reports) -> None:
        """Without a report nothing is known to have arrived, so everything failed."""
        keys: dict[bytes, None] = {}
        for part, report in zip(load.parts, reports, strict=True):
            failed = range(len(part.chunks)) if report is None else report.failed
            if report is not None and report.errors:
                self._report(f"load of {load.request_id}", report.errors[0])
            for index in failed:
                chunk = part.chunks[index]
                keys[chunk.key] = None
                if self._fails_by_block:
                    self._failed_blocks.update(chunk.block_ids)
        if not keys:
            return
        if not self._fails_by_block:
            self._failed_requests.add(load.request_id)
        self._failures[load.request_id] = tuple(keys)

    # Reporting.

    def _log_notices(self) -> None:
        if self._store is None:
            return
        for level, message in self._store.take_notices():
            logger.log(
                logging.WARNING if level == "warning" else logging.INFO, "kvrail: %s", message
            )

    def _report(self, operation: str, error: object) -> None:
        """Logs the first problem of each kind; the store counts and reports the rest."""
        kind = f"{operation.split()[0]} {type(error).__name__}"
        if kind not in self._reported:
            self._reported.add(kind)
            logger.warning("kvrail: %s: %s", operation, error)


def _current_stream(device: str) -> int:
    """The CUDA stream on which this thread's work for ``device`` runs, as a number."""
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)


def _chunk_by_chunk(parts: Sequence[GroupStore]) -> Iterator[tuple[int, StoreChunk]]:
    """A chunk of all groups before the next chunk, each with its group.

    Where memory for stores runs out, the end of the prompt is lost in all groups: without one of
    them no chunk can be loaded.
    """
    by_key: dict[bytes, list[tuple[int, StoreChunk]]] = {}
    # First a group that needs all chunks, in their order; one with a window needs the last ones.
    for part in sorted(parts, key=lambda part: len(part.chunks), reverse=True):
        for chunk in part.chunks:
            by_key.setdefault(chunk.key, []).append((part.group, chunk))
    for found in by_key.values():
        yield from found
