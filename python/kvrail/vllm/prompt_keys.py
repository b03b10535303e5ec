"""The chunk keys that a prompt has in a namespace, from vLLM's own hashes.

A namespace's identity says how vLLM hashed for it, so no engine and no weights are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvrail.vllm.fingerprint import AdapterFingerprints
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.lmcache_hash import PREFIX, LmcacheHasher
from kvrail.vllm.request_state import RequestState


class UnknownHashError(ValueError):
    """A namespace does not say how its chunk keys come about."""


class UnknownAdapterError(ValueError):
    """The weights of an adapter cannot be identified, so nothing of it is stored."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What vLLM's hashes depend on: the tokens, and what else a request carries."""

    tokens: Sequence[int]
    cache_salt: str | None = None
    adapter: tuple[str, str] | None = None
    """Name and path of a LoRA adapter, as the server was given them."""


@dataclass(frozen=True, slots=True)
class HashRecipe:
    """How the chunk keys of a namespace come about."""

    algorithm: str
    none_hash: bytes
    geometry: ChunkGeometry

    @classmethod
    def of_manifest(cls, manifest_json: str) -> HashRecipe:
        """The recipe in a namespace's manifest. Raises ``UnknownHashError`` where there is none."""
        try:
            identity = json.loads(manifest_json)["identity"]
            prefix_hash = identity["prefix_hash"]
            # With one KV cache group vLLM hashes block by block; else the identity says how.
            hash_tokens = prefix_hash.get("block_tokens")
            if hash_tokens is None:
                (group,) = identity["groups"]
                fields = group["fields"]
                sharded = fields.get("dcp_sharded", True)
                hash_tokens = _whole(fields["block_size"]) * (
                    _whole(identity["parallel"]["decode_context"]) if sharded else 1
                )
            hash_tokens = _whole(hash_tokens)
            return cls(
                algorithm=str(prefix_hash["algorithm"]),
                none_hash=bytes.fromhex(prefix_hash["none_hash"]),
                geometry=ChunkGeometry(_whole(identity["chunk_size"]), hash_tokens, hash_tokens),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnknownHashError(
                f"its identity does not say how prompts are hashed ({error!r})"
            ) from error

    def keys(self, prompt: Prompt) -> list[bytes]:
        """Keys of the chunks that a load of the prompt may cover, in order.

        Raises ``UnknownHashError`` for an algorithm that this vLLM has not, and
        ``UnknownAdapterError``.
        """
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        hasher = None
        # With LMCache's hashes vLLM's own only say how many whole blocks there are.
        algorithm = "sha256" if self.algorithm.startswith(PREFIX) else self.algorithm
        try:
            hash_function = get_hash_fn_by_name(algorithm)
            if algorithm != self.algorithm:
                name = self.algorithm.removeprefix(PREFIX)
                hasher = LmcacheHasher.from_key(name, self.none_hash)
        except ValueError as error:
            raise UnknownHashError(str(error)) from error
        lora_request = None
        if prompt.adapter is not None:
            name, path = prompt.adapter
            lora_request = LoRARequest(lora_name=name, lora_int_id=1, lora_path=path)
        fingerprint = None
        if lora_request is not None:
            fingerprint = AdapterFingerprints().of(lora_request)
            if fingerprint is None:
                raise UnknownAdapterError(f"the weights in {path} cannot be identified")
        with _chains_start_from(self.none_hash):
            request = Request(
                "explain",
                list(prompt.tokens),
                SamplingParams(max_tokens=1),
                None,
                lora_request=lora_request,
                cache_salt=prompt.cache_salt,
                block_hasher=get_request_block_hasher(self.geometry.hash_tokens, hash_function),
            )
        state = RequestState(request, fingerprint, hasher)
        return state.chunk_keys(self.geometry, state.loadable_chunks(self.geometry))


def _whole(value: Any) -> int:
    # JSON's true is a number to Python.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, not {value!r}")
    return value


@contextmanager
def _chains_start_from(none_hash: bytes) -> Iterator[None]:
    """Has vLLM start its hash chains from a namespace's value instead of this process's own."""
    from vllm.v1.core import kv_cache_utils

    missing = object()
    before: Any = getattr(kv_cache_utils, "NONE_HASH", missing)
    kv_cache_utils.NONE_HASH = kv_cache_utils.BlockHash(none_hash)
    try:
        yield
    finally:
        if before is missing:
            del kv_cache_utils.NONE_HASH
        else:
            kv_cache_utils.NONE_HASH = before
