"""KV events: which blocks are in storage, for routers that send a prompt to where its KV is.

vLLM publishes what ``take_events`` of the connector returns, beside the events of its own cache. A
chunk is announced when all ranks have published its files, by the hashes and the sizes of vLLM's
blocks, with the medium ``STORAGE``. It is taken back when this engine finds it gone or bad: other
instances and the janitor remove chunks, too, and whoever believes in one that is gone is told with
the next request that asks for it. Events are hints; a hit is decided by the lookup.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import ExternalBlockHash
    from vllm.v1.request import Request

    from kvrail.vllm.geometry import ChunkGeometry, GroupGeometry

# Chunks on their way to storage, and chunks announced that may be taken back: about 10 MB.
MAX_PLANNED = 16_384
MAX_ANNOUNCED = 65_536

Place = tuple[int, bytes]
"""A group, counted among those that are stored, and a chunk's key."""


@dataclass(slots=True)
class _Planned:
    event: BlockStored
    ranks: int
    """Ranks whose file is not published yet."""


class StorageEvents:
    """What became of chunks, as events for vLLM to publish."""

    def __init__(self, geometry: ChunkGeometry, ranks: Sequence[int]) -> None:
        """``ranks`` says for each group how many ranks store a file of each chunk."""
        self._geometry = geometry
        self._ranks = ranks
        self._planned: OrderedDict[Place, _Planned] = OrderedDict()
        self._announced: OrderedDict[Place, None] = OrderedDict()
        self._events: list[KVCacheEvent] = []

    def plan(self, request: Request, group: int, chunk: int, key: bytes) -> None:
        """Notes that a chunk of a request, by its index, is handed to the workers."""
        place = (group, key)
        if place in self._announced:
            return
        lora = request.lora_request
        geometry = self._geometry.groups[group]
        begin, end = self._blocks(geometry, chunk)
        size = geometry.block_tokens
        event = BlockStored(
            block_hashes=self._hashes(request, geometry, begin, end),
            parent_block_hash=next(iter(self._hashes(request, geometry, begin - 1, begin)), None),
            token_ids=list(request.all_token_ids[begin * size : end * size]),
            block_size=size,
            lora_id=lora.adapter_id if lora else None,
            medium=MEDIUM_STORAGE,
            lora_name=lora.name if lora else None,
            group_idx=geometry.index,
        )
        self._planned.pop(place, None)
        self._planned[place] = _Planned(event, self._ranks[group])
        while len(self._planned) > MAX_PLANNED:
            self._planned.popitem(last=False)

    def stored(self, published: Mapping[Place, int]) -> None:
        """Takes note of files that ranks have published: how many of each chunk."""
        for place, count in published.items():
            planned = self._planned.get(place)
            if planned is None:
                continue
            planned.ranks -= count
            if planned.ranks > 0:
                continue
            del self._planned[place]
            self._announced[place] = None
            self._events.append(planned.event)
        while len(self._announced) > MAX_ANNOUNCED:
            self._announced.popitem(last=False)

    def lost(self, request: Request, chunk: int, key: bytes) -> None:
        """Takes back what was announced of a chunk of a request that is gone or bad."""
        for place, geometry in enumerate(self._geometry.groups):
            if (place, key) not in self._announced:
                continue
            del self._announced[place, key]
            hashes = self._hashes(request, geometry, *self._blocks(geometry, chunk))
            self._events.append(
                BlockRemoved(block_hashes=hashes, medium=MEDIUM_STORAGE, group_idx=geometry.index)
            )

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return events

    @staticmethod
    def _blocks(geometry: GroupGeometry, chunk: int) -> tuple[int, int]:
        """The blocks of a request that a chunk's file holds, the end not among them."""
        end = (chunk + 1) * geometry.blocks_per_chunk
        return end - geometry.kept_blocks, end

    def _hashes(
        self, request: Request, geometry: GroupGeometry, begin: int, end: int
    ) -> list[ExternalBlockHash]:
        """The hashes of some blocks: that of a block is the hash of its last tokens."""
        step = geometry.block_tokens // self._geometry.hash_tokens
        known = request.block_hashes[max(0, begin) * step : end * step]
        return [maybe_convert_block_hash(known[i]) for i in range(step - 1, len(known), step)]
