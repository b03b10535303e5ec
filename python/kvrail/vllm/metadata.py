"""What the scheduler side and the worker side of the connector send each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvrail.vllm.loaded_weights import WeightsReport


class LoadChunk(NamedTuple):
    """One chunk to load, in the form ``KvCache.load`` takes."""

    key: bytes
    parent: bytes | None
    first_block: int
    """Blocks of the chunk's file before this one are not wanted and not written to."""
    block_ids: tuple[int, ...]


class StoreChunk(NamedTuple):
    """One chunk to store, in the form ``KvCache.store`` takes."""

    key: bytes
    parent: bytes | None
    block_ids: tuple[int, ...]


class GroupLoad(NamedTuple):
    """What is loaded for one KV cache group; ``group`` counts the groups that are stored."""

    group: int
    chunks: tuple[LoadChunk, ...]


class GroupStore(NamedTuple):
    """What is stored for one KV cache group; ``group`` counts the groups that are stored."""

    group: int
    chunks: tuple[StoreChunk, ...]


class RequestLoad(NamedTuple):
    """All that is loaded for one request; vLLM holds the request back until it is done."""

    request_id: str
    parts: tuple[GroupLoad, ...]


@dataclass(frozen=True, slots=True)
class KvrailMetadata(KVConnectorMetadata):
    """The work of one engine step."""

    loads: tuple[RequestLoad, ...] = ()
    stores: tuple[GroupStore, ...] = ()
    may_wait: bool = False
    """The step computes nothing, so the worker may spend a moment on waiting for a load."""
    weights_question: int | None = None
    """Asks which weights the worker has now; the answer carries this number."""


# Most steps have nothing for the connector; they share these two.
NO_WORK = KvrailMetadata()
NO_WORK_MAY_WAIT = KvrailMetadata(may_wait=True)


@dataclass(frozen=True, slots=True)
class KvrailWorkerMetadata(KVConnectorWorkerMetadata):
    """What the workers learned in this step."""

    failures: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Keys of the chunks that failed to load, by request."""
    stored: dict[tuple[int, bytes], int] = field(default_factory=dict)
    """How many ranks have published a chunk, by group and key; only where KV events are on."""
    weights: dict[tuple[int, int], WeightsReport] = field(default_factory=dict)
    """Which weights workers have, by the number of the question and the worker's rank."""
    handshakes: dict[tuple[int, int], KvrailHandshake] = field(default_factory=dict)
    """By pipeline and tensor rank, once, where vLLM's own way is another connector's."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merges what two workers learned; a chunk counts as failed when any rank failed."""
        if not isinstance(other, KvrailWorkerMetadata):
            raise TypeError(f"cannot merge {type(other).__name__} into kvrail's metadata")
        failures = dict(self.failures)
        for request_id, keys in other.failures.items():
            failures[request_id] = tuple(dict.fromkeys(failures.get(request_id, ()) + keys))
        stored = dict(self.stored)
        for place, count in other.stored.items():
            stored[place] = stored.get(place, 0) + count
        return KvrailWorkerMetadata(
            failures,
            stored,
            self.weights | other.weights,
            self.handshakes | other.handshakes,
        )


Part = int | tuple[int, int, int]
"""What a file is named by: the rank whose it is, also for its replicas, or a pipeline stage with a
range of KV heads, the first and the one behind the last."""


@dataclass(frozen=True, slots=True)
class KvrailHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler once, after its KV cache was registered."""

    model: str
    identity_json: str
    """The namespace's identity; empty when nothing is stored."""
    parts: tuple[Part, ...]
    """What this worker's files are named by, for each KV cache group."""
    world_size: int
    reason: str | None = None
    """Why nothing is stored or looked up, or None."""
