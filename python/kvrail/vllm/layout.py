"""From vLLM's KV cache configuration and tensors to memory that a store can move.

What is not known to be safe is refused: a model that is not supported is served without kvrail,
never with blocks that may be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from kvrail._core import ConfigError
from kvrail.kv_cache import KvMemory, UnsupportedMemoryError, from_tensors

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

# Subclasses add state or visibility rules of their own, so only these very classes count.
SUPPORTED_SPECS = (FullAttentionSpec, MLAAttentionSpec)


class UnsupportedModelError(RuntimeError):
    """Nothing of this model is stored or looked up; the message says why."""


def describe_group(index: int, group: KVCacheGroupSpec) -> str:
    """Group index, spec class and layers, short enough for one log line."""
    names = group.layer_names
    layers = ", ".join(names) if len(names) <= 4 else f"{names[0]} .. {names[-1]}"
    return (
        f"KV cache group {index} is {type(group.kv_cache_spec).__name__} "
        f"({len(names)} layers: {layers})"
    )


def select_group(kv_cache_config: KVCacheConfig) -> KVCacheGroupSpec:
    """The one group that is stored.

    Raises ``UnsupportedModelError`` when the model has other groups too: a hit on one of them would
    promise tokens that the rest cannot back.
    """
    groups = kv_cache_config.kv_cache_groups
    for index, group in enumerate(groups):
        problem = _group_problem(group)
        if problem is not None:
            raise UnsupportedModelError(f"{describe_group(index, group)}: {problem}")
    if len(groups) != 1:
        raise UnsupportedModelError(
            f"the model has {len(groups)} KV cache groups, this version stores models with one"
        )
    return groups[0]


def _group_problem(group: KVCacheGroupSpec) -> str | None:
    spec = group.kv_cache_spec
    if not isinstance(spec, FullAttentionSpec) or type(spec) not in SUPPORTED_SPECS:
        return "only full attention and MLA are supported"
    if spec.sliding_window is not None:
        return f"its sliding window of {spec.sliding_window} tokens is not supported"
    if spec.attention_chunk_size is not None:
        return f"its attention chunks of {spec.attention_chunk_size} tokens are not supported"
    if spec.non_causal:
        return "its tokens depend on later ones"
    if not group.enable_kv_transfer or group.host_resident:
        return "vLLM does not offer it for transfer"
    return None


def tokens_per_block(group: KVCacheGroupSpec, context_parallel_size: int) -> int:
    """Tokens that one block id stands for over all ranks that share a context."""
    spec = group.kv_cache_spec
    return spec.block_size * (context_parallel_size if spec.dcp_sharded else 1)


def blocks_per_chunk(chunk_size: int, block_tokens: int) -> int:
    """Blocks in one chunk. Raises ``ConfigError`` when the sizes do not fit."""
    if chunk_size < block_tokens or chunk_size % block_tokens:
        raise ConfigError(
            f"`chunk_size` = {chunk_size}: expected a multiple of vLLM's block size, {block_tokens}"
        )
    return chunk_size // block_tokens


def plan_memory(group: KVCacheGroupSpec, kv_caches: dict[str, Any], block_count: int) -> KvMemory:
    """The memory of a group's layers, in the order of the group's layer names.

    Raises ``UnsupportedModelError`` for memory that cannot be moved.
    """
    missing = [name for name in group.layer_names if name not in kv_caches]
    if missing:
        raise UnsupportedModelError(f"vLLM registered no KV cache for layer {missing[0]}")
    tensors = [kv_caches[name] for name in group.layer_names]
    try:
        return from_tensors(tensors, block_count, group.layer_names)
    except UnsupportedMemoryError as error:
        raise UnsupportedModelError(str(error)) from error
