"""How a worker's KV cache comes to a store: its groups, their names, the namespace, the memory."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrail import STARTUP_CPUS, cufile
from kvrail._core import Config, KvCache, KvrailError, Namespace, Store
from kvrail.vllm import layout
from kvrail.vllm.config import effective_value
from kvrail.vllm.direct import in_place_problem
from kvrail.vllm.heads import HeadShare, RankBoundError, head_shares
from kvrail.vllm.identity import attention_backends, build_identity, layout_name, model_name
from kvrail.vllm.lmcache_files import LmcacheFiles, describe_files
from kvrail.vllm.lmcache_hash import LmcacheHasher

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from kvrail.kv_cache import KvMemory
    from kvrail.vllm.metadata import Part
    from kvrail.vllm.worker_rank import WorkerRank

logger = logging.getLogger(f"vllm.{__name__}")

# Of a store to which nothing was given yet.
CLOSE_LIMIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """An open store with a worker's KV cache attached to it."""

    store: Store
    kv_caches: tuple[KvCache, ...]
    """By KV cache group, as all that follows."""
    parts: tuple[Part, ...]
    """What this worker's files are named by."""
    stored_groups: Collection[int]
    """The groups that this worker writes, by place."""
    identity_json: str
    device: str
    fails_by_block: bool
    """Whether vLLM can go on from any block that failed to load: with one group, of which all
    blocks before that one were loaded."""


def attach(
    open_store: Callable[..., Store],
    config: Config,
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: dict[str, Any],
    rank: WorkerRank,
) -> Attachment:
    """Opens the store and attaches a worker's KV cache to it.

    Raises ``UnsupportedModelError``, ``MismatchError`` or ``DamagedError`` where nothing can be
    stored, and another ``KvrailError`` for a configuration that cannot work.
    """
    groups = layout.select_groups(
        kv_cache_config,
        config.chunk_size,
        vllm_config.parallel_config.decode_context_parallel_size,
    )
    memories = [
        layout.plan_memory(group.spec, kv_caches, kv_cache_config.num_blocks) for group in groups
    ]
    layout.check_device(groups, memories[0].device)
    specs = [group.spec for group in groups]
    lmcache: tuple[LmcacheHasher, LmcacheFiles] | None = None
    options: dict[str, Any] = cufile.store_options()
    options["no_in_place"] = in_place_problem(vllm_config.model_config)
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
    store = open_store(
        config,
        namespace,
        # What differs from other namespaces is the same on all ranks; one of them says it.
        quiet=rank.global_rank != 0,
        cpus=STARTUP_CPUS,
        **options,
    )
    by_group: Sequence[HeadShare | None] = shares or [None] * len(groups)
    parts = tuple(rank.part(share) for share in by_group)
    try:
        attached = _attach_groups(store, groups, memories, parts, order)
    except BaseException:
        with contextlib.suppress(KvrailError):
            store.close(CLOSE_LIMIT_SECONDS)
        raise
    if rank.global_rank == 0:
        logger.info(
            "kvrail: %s: chunks of %d tokens, %s bytes each per rank; %s",
            namespace.directory_name,
            config.chunk_size,
            " + ".join(str(kv_cache.payload_bytes) for kv_cache in attached),
            "; ".join(
                ", ".join(f"{key} {value}" for key, value in mount.items())
                for mount in store.describe()
            ),
        )
    return Attachment(
        store,
        attached,
        parts,
        {place for place, share in enumerate(by_group) if rank.stores(share)},
        identity_json,
        memories[0].device,
        len(groups) == 1 and not groups[0].geometry.is_windowed,
    )


def _attach_groups(
    store: Store,
    groups: Sequence[layout.StoredGroup],
    memories: Sequence[KvMemory],
    parts: Sequence[Part],
    order: tuple[Any, ...] | None,
) -> tuple[KvCache, ...]:
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
            rank=parts[place],
            order=order,
        )
    return tuple(attached[place] for place in range(len(pairs)))


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
