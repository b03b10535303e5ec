"""From vLLM's KV cache configuration and tensors to memory that a store can move.

What is not known to be safe is refused: a model that is not supported is served without kvrail,
never with blocks that may be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
)

from kvrail._core import ConfigError
from kvrail.kv_cache import KvMemory, UnsupportedMemoryError, from_tensors
from kvrail.vllm.geometry import ChunkGeometry, GroupGeometry

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

# Subclasses add state or visibility rules of their own, so only these very classes count.
FULL_SPECS = (FullAttentionSpec, MLAAttentionSpec)


class UnsupportedModelError(RuntimeError):
    """Nothing of this model is stored or looked up; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A KV cache group of vLLM, and what of it is stored."""

    spec: KVCacheGroupSpec
    geometry: GroupGeometry


def describe_group(index: int, group: KVCacheGroupSpec) -> str:
    """Group index, spec class and layers, short enough for one log line."""
    names = group.layer_names
    layers = ", ".join(names) if len(names) <= 4 else f"{names[0]} .. {names[-1]}"
    return (
        f"KV cache group {index} is {type(group.kv_cache_spec).__name__} "
        f"({len(names)} layers: {layers})"
    )


def select_groups(
    kv_cache_config: KVCacheConfig, chunk_size: int, context_parallel_size: int
) -> tuple[StoredGroup, ...]:
    """All KV cache groups of the model: a hit needs what each of them needs at its end.

    Raises ``UnsupportedModelError`` when one of them is not understood, because a hit on the others
    would promise tokens that it cannot back, and ``ConfigError`` when the chunk size does not fit.
    """
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise UnsupportedModelError("the model has no KV cache")
    for index, group in enumerate(groups):
        problem = _group_problem(group)
        if problem is not None:
            raise UnsupportedModelError(f"{describe_group(index, group)}: {problem}")
    return tuple(
        StoredGroup(group, _geometry(index, group, chunk_size, context_parallel_size))
        for index, group in enumerate(groups)
    )


def chunk_geometry(
    groups: tuple[StoredGroup, ...], chunk_size: int, block_tokens: int, hash_tokens: int
) -> ChunkGeometry:
    """The geometry of requests; ``block_tokens`` and ``hash_tokens`` are the scheduler's.

    Raises ``ConfigError`` when the chunk size does not fit, and ``UnsupportedModelError`` where
    vLLM's own prefix cache may end inside the block of a state: it copies such a block while the
    request is admitted, at the same time as a load.
    """
    check_chunk_size(chunk_size, block_tokens)
    for group in groups:
        if group.geometry.holds_state and group.geometry.block_tokens != hash_tokens:
            raise UnsupportedModelError(
                f"{describe_group(group.geometry.index, group.spec)}: its blocks are of "
                f"{group.geometry.block_tokens} tokens and vLLM looks for its own cached states "
                f"every {hash_tokens}; unset prefix_match_unit"
            )
    return ChunkGeometry(
        chunk_size, block_tokens, hash_tokens, tuple(group.geometry for group in groups)
    )


def _geometry(
    index: int, group: KVCacheGroupSpec, chunk_size: int, context_parallel_size: int
) -> GroupGeometry:
    block_tokens = tokens_per_block(group, context_parallel_size)
    check_chunk_size(chunk_size, block_tokens)
    spec = _first_spec(group.kv_cache_spec)
    look_back = segment = None
    holds_state = isinstance(spec, MambaSpec)
    if holds_state:
        look_back = 1
    elif isinstance(spec, SlidingWindowSpec):
        look_back = spec.sliding_window - 1 + spec.extra_retained_tokens
    elif isinstance(spec, ChunkedLocalAttentionSpec):
        segment = spec.attention_chunk_size
    try:
        return GroupGeometry(index, block_tokens, chunk_size, look_back, segment, holds_state)
    except ValueError as error:
        raise UnsupportedModelError(f"{describe_group(index, group)}: {error}") from error


def _first_spec(spec: KVCacheSpec) -> KVCacheSpec:
    return next(iter(iter_layer_specs(spec)))


def _group_problem(group: KVCacheGroupSpec) -> str | None:
    if not group.enable_kv_transfer or group.host_resident:
        return "vLLM does not offer it for transfer"
    spec = group.kv_cache_spec
    specs = list(iter_layer_specs(spec))
    if not specs or (
        isinstance(spec, UniformTypeKVCacheSpecs) and len({_reach(layer) for layer in specs}) > 1
    ):
        return "its layers do not look back equally far"
    return next((problem for problem in map(_spec_problem, specs) if problem is not None), None)


def _reach(spec: KVCacheSpec) -> tuple[object, ...]:
    """What decides how far back a layer looks, to compare layers of one group."""
    if type(spec) in FULL_SPECS:
        return ("full",)
    names = ("sliding_window", "extra_retained_tokens", "attention_chunk_size")
    return (type(spec), *(getattr(spec, name, None) for name in names))


def _spec_problem(spec: KVCacheSpec) -> str | None:
    if type(spec) in FULL_SPECS:
        # Where vLLM's hybrid manager is off, windows are fields of this class; vLLM then keeps the
        # KV cache of all tokens, and so do chunks.
        assert isinstance(spec, FullAttentionSpec)
        return "its tokens depend on later ones" if spec.non_causal else None
    if type(spec) in (SlidingWindowSpec, ChunkedLocalAttentionSpec):
        return None
    if type(spec) is MambaSpec:
        return _state_problem(spec)
    return (
        "only full attention, MLA, sliding windows, chunked local attention and states are "
        f"supported, not {type(spec).__name__}"
    )


def _state_problem(spec: MambaSpec) -> str | None:
    if spec.mamba_cache_mode == "none":
        return "vLLM keeps its states at no boundary; start it with --enable-prefix-caching"
    if spec.mamba_cache_mode != "align":
        # Only in this mode vLLM says which block holds which state.
        return f"states are supported in mamba_cache_mode align, not {spec.mamba_cache_mode}"
    if spec.num_speculative_blocks:
        return "states with speculative decoding are not supported: drafts have states of their own"
    return None


def tokens_per_block(group: KVCacheGroupSpec, context_parallel_size: int) -> int:
    """Tokens that one block id stands for over all ranks that share a context."""
    spec = group.kv_cache_spec
    return spec.block_size * (context_parallel_size if spec.dcp_sharded else 1)


def fitting_chunk_size(
    chunk_size: int, kv_cache_config: KVCacheConfig, context_parallel_size: int
) -> int:
    """Tokens of a chunk that is whole blocks of every group: ``chunk_size``, or the next more.

    vLLM makes the blocks of models with states as large as a state, 528 tokens for one.
    """
    groups = kv_cache_config.kv_cache_groups
    step = math.lcm(*(tokens_per_block(group, context_parallel_size) for group in groups))
    return -(-chunk_size // step) * step


def check_chunk_size(chunk_size: int, block_tokens: int) -> None:
    """Raises ``ConfigError`` when a chunk is not a number of blocks."""
    if chunk_size < block_tokens or chunk_size % block_tokens:
        raise ConfigError(
            f"`chunk_size` = {chunk_size}: expected a multiple of vLLM's block size, {block_tokens}"
        )


def plan_memory(group: KVCacheGroupSpec, kv_caches: dict[str, Any], block_count: int) -> KvMemory:
    """The memory of a group's layers, in the order of the group's layer names.

    Layers that share the KV cache of another are left out: its bytes are moved once. Raises
    ``UnsupportedModelError`` for memory that cannot be moved.
    """
    if not group.layer_names:
        raise UnsupportedModelError("a KV cache group has no layers on this rank")
    missing = [name for name in group.layer_names if name not in kv_caches]
    if missing:
        raise UnsupportedModelError(f"vLLM registered no KV cache for layer {missing[0]}")
    tensors = dict(_tensors(group, kv_caches))
    names = stored_layers(tensors)
    try:
        return from_tensors([tensors[name] for name in names], block_count, names)
    except UnsupportedMemoryError as error:
        raise UnsupportedModelError(str(error)) from error


def check_device(groups: Sequence[StoredGroup], device: str) -> None:
    """Raises ``UnsupportedModelError`` where vLLM cannot go on from KV cache that it is given.

    Its CPU backend turns prefix caching off for MLA (``platforms/cpu.py``). With its own prefix
    cache forced on it answers wrongly, as after a load: seen with DeepSeek-V2 and vLLM 0.32.
    """
    if device != "cpu":
        return
    for group in groups:
        specs = iter_layer_specs(group.spec.kv_cache_spec)
        if any(isinstance(spec, MLAAttentionSpec) for spec in specs):
            raise UnsupportedModelError(
                f"{describe_group(group.geometry.index, group.spec)}: vLLM computes wrongly on top "
                "of cached MLA blocks on a CPU, and turns its own prefix caching off there"
            )


def _tensors(group: KVCacheGroupSpec, kv_caches: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a group's layers by name; a state may be several, in one page."""
    for name in group.layer_names:
        cache = kv_caches[name]
        if isinstance(cache, list | tuple):
            yield from ((f"{name}.{part}", tensor) for part, tensor in enumerate(cache))
        else:
            yield name, cache


def stored_layers(tensors: dict[str, Any]) -> list[str]:
    """The names of the tensors without those that are the same memory as an earlier one."""
    first_of: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        first_of.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return list(first_of.values())
