"""How requests map to chunks, and what the scheduler side remembers of each request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvrail.vllm.geometry import ChunkGeometry
    from kvrail.vllm.lmcache_hash import LmcacheHasher
    from kvrail.vllm.load_or_compute import Verdict


class Ticket(Protocol):
    """The part of ``LookupTicket`` that the scheduler side uses."""

    def poll(self) -> int | None: ...

    def wait(self, limit_seconds: float) -> int: ...


@dataclass(slots=True)
class RequestState:
    """One request between its arrival and its end."""

    request: Request
    adapter: bytes | None = None
    """Fingerprint of the request's LoRA adapter, part of its chunk keys."""
    hasher: LmcacheHasher | None = None
    """What makes chunk keys of tokens, where they are not vLLM's own hashes."""
    salt: bytes = b""
    """What stands for weights that are not those of the namespace."""
    is_left_alone: bool = False
    """Whether nothing is loaded or stored any more: some of its KV cache is of weights of which
    nothing is known."""
    keys: list[bytes] = field(default_factory=list)
    ticket: Ticket | None = None
    submitted_at: float = 0.0
    hit_chunks: int | None = None
    """Leading chunks that the last lookup found, or None while there is no answer."""
    answered_at: float = 0.0
    local_tokens: int = 0
    promised_tokens: int = 0
    """End of the prefix that vLLM was told can be loaded; 0 when no promise is open."""
    verdict: Verdict | None = None
    """Whether the hit is to be loaded, from the first time that it was asked until it is used."""
    stored_chunks: int = 0
    """Leading chunks that need no store: found by the lookup, or submitted before."""
    load_failed: bool = False
    counted: bool = False
    explained_chunks: int | None = None
    """Leading chunks that the store had when vLLM took the request up, for whoever asks why."""

    def start_over(self) -> None:
        """Forgets everything that was known of its chunks, whose keys will be others."""
        self.keys.clear()
        self.ticket = None
        self.hit_chunks = None
        self.promised_tokens = 0
        self.verdict = None
        self.stored_chunks = 0
        self.load_failed = False
        self.explained_chunks = None

    def loadable_chunks(self, geometry: ChunkGeometry) -> int:
        """Chunks that a load may cover: the last token is left to compute, to sample from."""
        request = self.request
        return min(
            (request.num_tokens - 1) // geometry.chunk_size,
            len(request.block_hashes) // geometry.hashes_per_chunk,
        )

    def chunk_keys(self, geometry: ChunkGeometry, count: int) -> list[bytes]:
        """Keys of the leading chunks, at most `count` and no more than there are block hashes for.

        A chunk's key is vLLM's chained hash of its last block, which covers all tokens before it
        and everything else that vLLM lets a block depend on; or LMCache's hash of its tokens.
        """
        hashes = self.request.block_hashes
        per_chunk = geometry.hashes_per_chunk
        keys = self.keys
        for index in range(len(keys), min(count, len(hashes) // per_chunk)):
            if self.hasher is not None:
                begin = index * geometry.chunk_size
                tokens = self.request.all_token_ids[begin : begin + geometry.chunk_size]
                keys.append(self.hasher.key(tokens, keys[-1] if keys else None))
                continue
            key = bytes(hashes[(index + 1) * per_chunk - 1])
            if self.salt or self.adapter is not None:
                key = hashlib.sha256(self.salt + (self.adapter or b"") + key).digest()
            keys.append(key)
        return keys[:count]
