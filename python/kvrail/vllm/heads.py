"""Which KV heads a rank has, where files can be named by them.

With heads outermost inside a block's layer, the bytes of any range of heads are runs of their own,
so what ranks of one tensor-parallel size stored, ranks of another can use. Where that is not known
for sure, the tensor-parallel size stays in the namespace and files are named by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    iter_layer_specs,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

# Blocks, then heads: in these layouts only.
HEADS_OUTERMOST = ("LBHNC", "BLHNC")
# Where the bytes of a head say nothing about another one's.
INDEPENDENT_HEADS = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)


class RankBoundError(RuntimeError):
    """Files are of use to the same tensor-parallel size only; the message says why."""


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one KV cache group that a rank has, counted over all ranks."""

    first: int
    end: int
    """The head behind the last."""
    total: int
    is_first: bool
    """Whether this rank is the first that has them: where there are more ranks than heads, several
    have the same, and one stores them."""

    @property
    def count(self) -> int:
        """How many heads the rank has."""
        return self.end - self.first


def head_shares(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    groups: Sequence[KVCacheGroupSpec],
    kv_caches: Mapping[str, Any],
    tensor_rank: int,
    layout_name: str,
) -> tuple[HeadShare, ...]:
    """The heads of each group that the rank ``tensor_rank`` has.

    Raises ``RankBoundError`` where a group's blocks are not made of whole heads one after the
    other, or how heads are dealt out is not known.
    """
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1:
        raise RankBoundError("with decode context parallelism ranks hold other tokens")
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != vllm_config.model_config.model:
        raise RankBoundError("a draft model deals out its heads in its own way")
    size = parallel.tensor_parallel_size
    shares = []
    for group in groups:
        total = _total_heads(vllm_config, group)
        if total % size and size % total:
            raise RankBoundError(f"{total} KV heads on {size} ranks")
        if total > 1 and layout_name not in HEADS_OUTERMOST:
            raise RankBoundError(f"the KV cache layout {layout_name} has no heads outermost")
        count = max(1, total // size)
        for name in group.layer_names:
            _check_tensor(name, kv_caches[name], kv_cache_config.num_blocks, count)
        replicas = max(1, size // total)
        first = tensor_rank // replicas * count
        shares.append(HeadShare(first, first + count, total, tensor_rank % replicas == 0))
    return tuple(shares)


def _total_heads(vllm_config: VllmConfig, group: KVCacheGroupSpec) -> int:
    """The heads of a group over all ranks."""
    size = vllm_config.parallel_config.tensor_parallel_size
    totals = set()
    for spec in iter_layer_specs(group.kv_cache_spec):
        if not isinstance(spec, AttentionSpec):
            raise RankBoundError(f"{type(spec).__name__} has no heads")
        if spec.num_heads != spec.num_kv_heads:
            raise RankBoundError("blocks have other slots than one for each KV head")
        if spec.kv_quant_mode not in INDEPENDENT_HEADS and not isinstance(spec, MLAAttentionSpec):
            raise RankBoundError(f"KV cache quantization {spec.kv_quant_mode.name}")
        if isinstance(spec, MLAAttentionSpec):
            # One latent for all heads: the same bytes on each rank, which vLLM has to say.
            total = 1 if spec.max_tp_shards == 1 else None
        else:
            total = vllm_config.model_config.get_total_num_kv_heads()
        if total is None or spec.num_kv_heads != max(1, total // size):
            raise RankBoundError(f"{spec.num_kv_heads} KV heads on a rank, of {total}")
        totals.add(total)
    if len(totals) != 1:
        raise RankBoundError("layers of a group differ in the number of KV heads")
    return totals.pop()


def _check_tensor(name: str, tensor: Any, block_count: int, heads: int) -> None:
    """Raises ``RankBoundError`` unless a block is ``heads`` runs of equal length."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    dense = [1]
    for size in reversed(shape[2:]):
        dense.insert(0, dense[0] * size)
    # The stride of a single head says nothing.
    runs = strides[1:] if heads > 1 else (dense[0], *strides[2:])
    if len(shape) != 4 or shape[:2] != (block_count, heads) or list(runs) != dense:
        raise RankBoundError(
            f"{name}: {heads} heads are not outermost in a block "
            f"(shape {shape}, strides {strides}, {block_count} blocks)"
        )
