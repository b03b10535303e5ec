"""What LMCache's files say of a model's KV cache, and which models and requests they can hold.

LMCache knows one KV cache group of full attention or MLA. Its files have no place for what else
decides about KV bytes, so whatever could be taken for something else is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec

from kvrail.vllm.layout import StoredGroup, UnsupportedModelError, describe_group

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

    from kvrail.vllm.lmcache_hash import LmcacheHasher

# LMCache's names of element types, by the names of torch's types.
ELEMENTS = {
    "float16": "half",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
    "uint8": "uint8",
    "int8": "int8",
}
# Backends that keep K and V of a token and head beside each other.
_INTERLEAVED = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"})
# Of vLLM's CPU backend: those instruction sets with which K lies by elements and V by tokens.
_BY_ELEMENTS = frozenset({"CPU_ATTN/vec", "CPU_ATTN/vec16"})
_TAG = "lmcache.tag."

Side = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """How the KV of a layer's block lies; strides in bytes, sides are K and V, or one for MLA."""

    tokens: int
    heads: int
    head_size: int
    element_bytes: int
    sides: tuple[Side, ...]
    """Offset of the first element; strides of head, token and element."""

    def as_tuple(self) -> tuple[int, int, int, int, list[Side]]:
        """The form that ``Store.attach`` takes."""
        return (self.tokens, self.heads, self.head_size, self.element_bytes, list(self.sides))


@dataclass(frozen=True, slots=True)
class LmcacheFiles:
    """What the names and heads of a model's files say, the same for all ranks."""

    model: str
    workers: int
    element: str
    has_sign: bool
    order: TokenOrder

    def names(self) -> tuple[str, int, str, bool]:
        """The form that ``Store`` takes."""
        return (self.model, self.workers, self.element, self.has_sign)

    def as_json(self) -> dict[str, Any]:
        """The form that a namespace's identity has it in."""
        order = self.order
        return {
            "model": self.model,
            "workers": self.workers,
            "element": self.element,
            "has_sign": self.has_sign,
            "block_tokens": order.tokens,
            "heads": order.heads,
            "head_size": order.head_size,
            "element_bytes": order.element_bytes,
            "sides": [list(side) for side in order.sides],
        }


def names_of_identity(identity_json: str) -> tuple[str, int, str, bool]:
    """The form that ``Store`` takes, from an identity made with ``LmcacheFiles.as_json``."""
    files = json.loads(identity_json)["lmcache"]
    return (files["model"], files["workers"], files["element"], files["has_sign"])


def describe_files(
    vllm_config: VllmConfig,
    groups: Sequence[StoredGroup],
    tensors: Sequence[Any],
    backends: Sequence[str],
    hasher: LmcacheHasher,
) -> LmcacheFiles:
    """What LMCache's files of this model say. ``tensors`` are those of the only group's layers.

    Raises ``UnsupportedModelError`` for a model whose KV is not known to be what LMCache would
    write under the same name.
    """
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    parallel = vllm_config.parallel_config
    if len(groups) != 1 or groups[0].geometry.is_windowed:
        raise UnsupportedModelError(
            "LMCache's files hold one KV cache group of full attention, this model has "
            + "; ".join(describe_group(g.geometry.index, g.spec) for g in groups)
        )
    spec = groups[0].spec.kv_cache_spec
    is_mla = type(spec) is MLAAttentionSpec
    problem = None
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        problem = f"{type(spec).__name__} is not known there"
    elif vllm_config.speculative_config is not None:
        problem = "with speculative decoding it is not known which layers its files have"
    elif parallel.decode_context_parallel_size > 1:
        problem = "decode context parallelism is not known there"
    elif is_mla and parallel.pipeline_parallel_size > 1:
        problem = "it stores the first stage of an MLA model only"
    elif len(tensors) != len(groups[0].spec.layer_names):
        problem = "layers share KV"
    elif not _is_ascending(groups[0].spec.layer_names):
        problem = "layers are not in the order of their numbers"
    if problem is not None:
        raise UnsupportedModelError(f"LMCache's files: {problem}")
    dtype = get_kv_cache_torch_dtype(
        vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
    )
    found = {tensor.dtype for tensor in tensors}
    element = ELEMENTS.get(str(dtype).removeprefix("torch."))
    if found != {dtype} or element is None:
        raise UnsupportedModelError(
            f"LMCache's files: a KV cache of {', '.join(sorted(map(str, found)))} for {dtype}"
        )
    orders = {token_order(spec, tensor, backends) for tensor in tensors}
    if len(orders) != 1:
        raise UnsupportedModelError("LMCache's files: layers differ in the order of their KV")
    return LmcacheFiles(
        model=vllm_config.model_config.model,
        # All workers of an MLA model have the same bytes; LMCache has the first of them write.
        workers=1 if is_mla else parallel.world_size,
        element=element,
        has_sign=hasher.has_sign,
        order=orders.pop(),
    )


def _is_ascending(names: Sequence[str]) -> bool:
    from vllm.model_executor.models.utils import extract_layer_index

    numbers = [extract_layer_index(name) for name in names]
    return numbers == sorted(numbers)


def token_order(spec: KVCacheSpec, tensor: Any, backends: Sequence[str]) -> TokenOrder:
    """The order of KV in the blocks of a layer, from its view [block, head, token, content].

    Raises ``UnsupportedModelError`` for an order that is not known.
    """
    assert isinstance(spec, FullAttentionSpec)
    is_mla = isinstance(spec, MLAAttentionSpec)
    heads, tokens, size = spec.num_kv_heads, spec.block_size, spec.head_size
    contents = size if is_mla else 2 * size
    known = is_mla or (len(backends) == 1 and backends[0] in _INTERLEAVED | _BY_ELEMENTS)
    fits = (
        tensor.dim() == 4
        and tuple(tensor.shape[1:]) == (heads, tokens, contents)
        and (is_mla or spec.head_size_v == size)
        and tensor.stride(3) == 1
    )
    if not known or not fits:
        raise UnsupportedModelError(
            f"LMCache's files: the order of KV in blocks of {', '.join(backends)} with the shape "
            f"{tuple(tensor.shape)} is not known"
        )
    item = tensor.element_size()
    head, token = tensor.stride(1) * item, tensor.stride(2) * item
    sides: tuple[Side, ...]
    if is_mla:
        sides = ((0, head, token, item),)
    elif backends[0] in _INTERLEAVED:
        sides = ((0, head, token, item), (size * item, head, token, item))
    else:
        # Inside a head: K as [element, token], behind it V as [token, element].
        sides = (
            (0, head, item, tokens * item),
            (tokens * size * item, head, size * item, item),
        )
    return TokenOrder(tokens, heads, size, item, sides)


def request_problem(request: Request) -> str | None:
    """Why LMCache's hashes do not identify the KV of a request, or None.

    They are made of tokens alone: what else decides about KV would be taken for something else.
    """
    if request.lora_request is not None:
        return "LoRA"
    if request.cache_salt:
        return "cache_salt"
    if request.mm_features:
        return "multimodal inputs"
    if getattr(request, "prompt_embeds", None) is not None:
        return "prompt embeddings"
    parameters = request.kv_transfer_params or {}
    if any(str(name).startswith(_TAG) for name in parameters):
        return "tags of LMCache"
    return None
