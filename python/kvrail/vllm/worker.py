"""The worker side of the connector: moves what the scheduler side planned.

Loads run in the background and are polled once per step. Stores copy the blocks into staging memory
before ``submit_stores`` returns and are written in the background, so vLLM may reuse a block as
soon as the step is over. For the same reason nothing has to be done when vLLM preempts a request.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvrail import STARTUP_CPUS, cufile
from kvrail._core import (
    Config,
    DamagedError,
    KvCache,
    KvrailError,
    LoadReport,
    LoadTicket,
    MismatchError,
    Namespace,
    Store,
    StoreTicket,
    WaitTimeoutError,
)
from kvrail.vllm import layout
from kvrail.vllm.config import effective_value
from kvrail.vllm.heads import HeadShare, RankBoundError, head_shares
from kvrail.vllm.identity import attention_backends, build_identity, layout_name, model_name
from kvrail.vllm.lmcache_files import LmcacheFiles, describe_files
from kvrail.vllm.lmcache_hash import LmcacheHasher
from kvrail.vllm.metadata import (
    KvrailHandshake,
    KvrailMetadata,
    KvrailWorkerMetadata,
    Part,
    RequestLoad,
)
from kvrail.vllm.stats import StatsCollector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from kvrail.kv_cache import KvMemory
    from kvrail.vllm.stats import KvrailStats

logger = logging.getLogger(f"vllm.{__name__}")

# A step without work for the model would be repeated at once; waiting here spares the spinning.
IDLE_WAIT_SECONDS = 0.002
# vLLM kills its workers a few seconds after it asked them to end. Stores that are not written by
# then are lost, which costs a miss later and nothing else.
CLOSE_LIMIT_SECONDS = 3.0
# Stores that are watched for KV events; of more at a time the oldest are not announced.
MAX_STORING = 16_384


@dataclass(frozen=True, slots=True)
class WorkerRank:
    """The place of a worker in its engine."""

    global_rank: int
    storage_rank: int
    """The rank whose files are read: this one, or that of the rank it is a replica of."""
    world_size: int
    tensor_rank: int = 0
    stage: int = 0
    """The pipeline stage."""

    def part(self, share: HeadShare | None) -> Part:
        """What this rank's files of a KV cache group are named by."""
        return self.storage_rank if share is None else (self.stage, share.first, share.end)

    def stores(self, share: HeadShare | None) -> bool:
        """Whether this rank writes; replicas hold the same bytes, so one of them does."""
        return self.global_rank == self.storage_rank if share is None else share.is_first

    @classmethod
    def current(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> WorkerRank:
        """The rank of this process."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        parallel = vllm_config.parallel_config
        tensor_rank = get_tp_group().rank_in_group
        stage = get_pp_group().rank_in_group
        first = stage * parallel.tensor_parallel_size
        replica = tensor_rank % max(1, kv_cache_config.kv_tp_replicas)
        return cls(
            global_rank=first + tensor_rank,
            storage_rank=first + tensor_rank - replica,
            world_size=parallel.pipeline_parallel_size * parallel.tensor_parallel_size,
            tensor_rank=tensor_rank,
            stage=stage,
        )

    def in_files_of_lmcache(self, workers: int) -> WorkerRank:
        """The place of this worker where each has files, or all the files of the first."""
        return replace(self, storage_rank=self.global_rank if workers == self.world_size else 0)


Reports = list[LoadReport | None]


class _Loading:
    """A request's loads under way, one for each KV cache group that takes part."""

    def __init__(self, load: RequestLoad, tickets: list[LoadTicket | None]) -> None:
        self.load = load
        self.tickets = tickets
        """Those that were submitted and are not done."""
        self.reports: Reports = [None] * len(load.parts)

    @property
    def is_over(self) -> bool:
        """Whether nothing writes to the request's blocks any more."""
        return all(ticket is None for ticket in self.tickets)

    def poll(self, report_error: Callable[[str, object], None]) -> None:
        """Takes what is done; an error ends a load without a report."""
        for place, ticket in enumerate(self.tickets):
            if ticket is None:
                continue
            try:
                report = ticket.poll()
            except KvrailError as error:
                report_error("load", error)
                self.tickets[place] = None
                continue
            if report is not None:
                self._take(place, report)

    def wait(self, limit_seconds: float, report_error: Callable[[str, object], None]) -> None:
        """Waits a moment for the first that is not done.

        A load is never given up here: the store may still write to the blocks, and it ends every
        load within its own limit.
        """
        place, ticket = next((p, t) for p, t in enumerate(self.tickets) if t is not None)
        try:
            self._take(place, ticket.wait(limit_seconds))
        except WaitTimeoutError:
            return
        except KvrailError as error:
            report_error("load", error)
            self.tickets[place] = None

    def _take(self, place: int, report: LoadReport) -> None:
        self.tickets[place] = None
        self.reports[place] = report


class ConnectorWorker:
    """One worker's store, its attached KV cache and the loads under way."""

    def __init__(self, open_store: Callable[..., Store] = Store) -> None:
        self._open_store = open_store
        self._store: Store | None = None
        self._kv_caches: tuple[KvCache, ...] = ()
        self._fails_by_block = True
        self._device = "cpu"
        self._parts: tuple[Part, ...] = ()
        self._stored_groups: Container[int] = range(sys.maxsize)
        self._announces = False
        self._storing: deque[tuple[tuple[int, bytes], StoreTicket]] = deque(maxlen=MAX_STORING)
        self._loading: dict[str, _Loading] = {}
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
        events = vllm_config.kv_events_config
        self._announces = events is not None and events.enable_kv_cache_events
        reason = None
        identity_json = ""
        try:
            identity_json, rank = self._attach(
                config, vllm_config, kv_cache_config, kv_caches, rank
            )
        except (layout.UnsupportedModelError, MismatchError, DamagedError) as error:
            self.shutdown()
            reason = str(error)
            if rank.global_rank == 0:
                logger.warning("kvrail: nothing is stored or loaded: %s", reason)
        self._handshake = KvrailHandshake(
            model=model_name(vllm_config),
            identity_json=identity_json,
            parts=self._parts,
            world_size=rank.world_size,
            reason=reason,
        )

    def _attach(
        self,
        config: Config,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        kv_caches: dict[str, Any],
        rank: WorkerRank,
    ) -> tuple[str, WorkerRank]:
        """Opens the store and attaches; returns the identity, and the rank by its files."""
        groups = layout.select_groups(
            kv_cache_config,
            config.chunk_size,
            vllm_config.parallel_config.decode_context_parallel_size,
        )
        memories = [
            layout.plan_memory(group.spec, kv_caches, kv_cache_config.num_blocks)
            for group in groups
        ]
        layout.check_device(groups, memories[0].device)
        specs = [group.spec for group in groups]
        lmcache: tuple[LmcacheHasher, LmcacheFiles] | None = None
        options: dict[str, Any] = cufile.store_options()
        order = None
        if config.lmcache_hash is not None:
            hasher = LmcacheHasher.of_process(config.lmcache_hash)
            files = describe_files(
                vllm_config,
                groups,
                [kv_caches[name] for name in memories[0].names],
                attention_backends(vllm_config, specs),
                hasher,
            )
            lmcache = (hasher, files)
            if effective_value(config, "layout") == "lmcache":
                options["lmcache"] = files.names()
                rank = rank.in_files_of_lmcache(files.workers)
                order = files.order.as_tuple()
        # LMCache's files are those of a rank, also where they were copied to a store of ours.
        shares = None
        if lmcache is None:
            shares = _head_shares(vllm_config, kv_cache_config, specs, kv_caches, rank)
        identity = build_identity(
            vllm_config,
            kv_cache_config,
            list(zip(specs, memories, strict=True)),
            config.chunk_size,
            lmcache=lmcache,
            heads=shares,
        )
        identity_json = json.dumps(identity, sort_keys=True)
        namespace = Namespace(model_name(vllm_config), identity_json)
        store = self._open_store(
            config,
            namespace,
            # What differs from other namespaces is the same on all ranks; one of them says it.
            quiet=rank.global_rank != 0,
            cpus=STARTUP_CPUS,
            **options,
        )
        self._store = store
        by_group: Sequence[HeadShare | None] = shares or [None] * len(groups)
        self._parts = tuple(rank.part(share) for share in by_group)
        self._stored_groups = {place for place, share in enumerate(by_group) if rank.stores(share)}
        kv_caches_by_group = self._attach_groups(store, groups, memories, order)
        fails_by_block = len(groups) == 1 and not groups[0].geometry.is_windowed
        self.adopt(store, kv_caches_by_group, memories[0].device, fails_by_block=fails_by_block)
        if rank.global_rank == 0:
            logger.info(
                "kvrail: %s: chunks of %d tokens, %s bytes each per rank; %s",
                namespace.directory_name,
                config.chunk_size,
                " + ".join(str(kv_cache.payload_bytes) for kv_cache in kv_caches_by_group),
                "; ".join(
                    ", ".join(f"{key} {value}" for key, value in mount.items())
                    for mount in store.describe()
                ),
            )
        self._log_notices()
        return identity_json, rank

    def _attach_groups(
        self,
        store: Store,
        groups: Sequence[layout.StoredGroup],
        memories: Sequence[KvMemory],
        order: tuple[Any, ...] | None,
    ) -> list[KvCache]:
        """Attaches all groups, that with the largest chunks first: they cut the staging memory."""
        pairs = list(zip(groups, memories, strict=True))
        largest_first = sorted(
            range(len(pairs)),
            key=lambda place: -pairs[place][0].geometry.kept_blocks * pairs[place][1].block_bytes,
        )
        attached: dict[int, KvCache] = {}
        for place in largest_first:
            group, memory = pairs[place]
            attached[place] = memory.attach(
                store,
                blocks_per_chunk=group.geometry.kept_blocks,
                group=group.geometry.index,
                rank=self._parts[place],
                order=order,
            )
        return [attached[place] for place in range(len(pairs))]

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
        """Submits this step's loads."""
        for load in metadata.loads:
            self._stats.touch()
            # Whatever was submitted is waited for: it may still write to the request's blocks.
            loading = _Loading(load, [None] * len(load.parts))
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
            for part in metadata.stores:
                if part.group not in self._stored_groups:
                    continue
                kv_cache = self._kv_caches[part.group]
                if not self._announces:
                    kv_cache.store(part.chunks, **self._in_order())
                    continue
                # A ticket counts; which chunk it is about is known when it is about one.
                for chunk in part.chunks:
                    ticket = kv_cache.store((chunk,), **self._in_order())
                    self._storing.append(((part.group, chunk.key), ticket))
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
        if not self._settled and metadata is not None and metadata.no_forward:
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
        if not self._failures and not self._storing:
            return None
        failures, self._failures = self._failures, {}
        stored = self._take_stored()
        return KvrailWorkerMetadata(failures, stored) if failures or stored else None

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

    # Loads.

    def _poll_loads(self) -> None:
        for loading in list(self._loading.values()):
            loading.poll(self._report)
            self._settle_if_over(loading)

    def _wait_for_a_load(self) -> None:
        loading = next(iter(self._loading.values()))
        loading.wait(IDLE_WAIT_SECONDS, self._report)
        self._settle_if_over(loading)

    def _settle_if_over(self, loading: _Loading) -> None:
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


def _head_shares(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    groups: Sequence[KVCacheGroupSpec],
    kv_caches: dict[str, Any],
    rank: WorkerRank,
) -> tuple[HeadShare, ...] | None:
    """This rank's heads of each group; None where files are of use to this parallel size only."""
    name = layout_name(vllm_config, kv_cache_config)
    try:
        return head_shares(vllm_config, kv_cache_config, groups, kv_caches, rank.tensor_rank, name)
    except RankBoundError as reason:
        if rank.global_rank == 0:
            logger.info(
                "kvrail: chunks are shared at the same tensor-parallel size only: %s", reason
            )
        return None


def _current_stream(device: str) -> int:
    """The CUDA stream on which this thread's work for ``device`` runs, as a number."""
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)
