"""KV caches that need a GPU to compute with, in memory that vLLM's own functions allocate.

Quantized ones: vLLM keeps the scales of a per-token type behind each head's data, inside the page
that its spec describes, so that they move with it. And MLA with a sparse indexer, whose group has
layers with pages of two sizes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from store_harness import LIMIT_SECONDS, key, open_store
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
    get_kv_quant_mode,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from kvrail.vllm import layout

BLOCK_TOKENS, HEADS, HEAD_SIZE = 16, 2, 64
LAYERS = [f"model.layers.{index}.self_attn.attn" for index in range(3)]
BLOCKS, BLOCKS_PER_CHUNK = 12, 4
SCALE_BYTES = 4


def full(cache_dtype: str, dtype: torch.dtype) -> FullAttentionSpec:
    """A layer's spec as vLLM's Triton backend completes it."""
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )
    return TritonAttentionBackend.customize_spec(spec)


def mla(cache_dtype: str, state_bytes: int) -> MLAAttentionSpec:
    """A layer's spec as `mla_attention.py` makes it: the latent state, and scales behind it."""
    return MLAAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=1,
        head_size=576,
        dtype=torch.uint8,
        cache_dtype_str=cache_dtype,
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
        state_content_bytes=state_bytes,
    )


# Each with the bytes of one token of one head, data and scales.
SPECS = {
    "fp8": (full("fp8", torch.uint8), 2 * HEAD_SIZE),
    "fp8_per_token_head": (full("fp8_per_token_head", torch.uint8), 2 * (HEAD_SIZE + SCALE_BYTES)),
    "int8_per_token_head": (full("int8_per_token_head", torch.int8), 2 * (HEAD_SIZE + SCALE_BYTES)),
    "int4_per_token_head": (
        full("int4_per_token_head", torch.uint8),
        2 * (HEAD_SIZE // 2 + SCALE_BYTES),
    ),
    "fp8_ds_mla": (mla("fp8_ds_mla", 656), 656),
    "nvfp4_ds_mla": (mla("nvfp4_ds_mla", 352), 352),
}
LAYOUTS = [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC, KVCacheLayout.BLNHC]


def allocated(
    group: KVCacheGroupSpec, kv_layout: KVCacheLayout, seed: int
) -> tuple[KVCacheConfig, dict[str, torch.Tensor]]:
    """vLLM's KV cache of random bytes."""
    settings = SimpleNamespace(
        num_gpu_blocks_override=BLOCKS,
        prefix_cache_retention_interval=None,
        get_resolved_kv_cache_layout=lambda: kv_layout,
    )
    config = SimpleNamespace(
        cache_config=settings, attention_config=SimpleNamespace(hisparse_config=None)
    )
    kv_cache_config = get_kv_cache_config_from_groups(config, [group], 1 << 30)
    views = allocate_kv_cache(kv_cache_config, torch.device("cpu"), kv_layout)
    backing = torch.empty(0, dtype=torch.uint8).set_(views[group.layer_names[0]].untyped_storage())
    generator = torch.Generator().manual_seed(seed)
    backing.copy_(torch.randint(0, 256, backing.shape, dtype=torch.uint8, generator=generator))
    return kv_cache_config, views


def page(view: torch.Tensor, block: int) -> bytes:
    """A block's bytes of a layer, as vLLM addresses them."""
    return view[block].contiguous().view(torch.uint8).numpy().tobytes()


def check_round_trip(
    path: Path, made: KVCacheGroupSpec, kv_layout: KVCacheLayout, block_bytes: int
) -> None:
    """Stores a chunk of one KV cache and loads it into other blocks of another."""
    kv_cache_config, source = allocated(made, kv_layout, seed=1)
    _, target = allocated(made, kv_layout, seed=2)
    tokens = made.kv_cache_spec.block_size
    (group,) = layout.select_groups(kv_cache_config, BLOCKS_PER_CHUNK * tokens, 1)
    stored, loaded = [7, 2, 9, 4], [0, 11, 5, 3]
    before = {layer: view.clone() for layer, view in target.items()}
    with open_store(path) as store:
        memory = layout.plan_memory(group.spec, source, BLOCKS)
        assert memory.block_bytes == block_bytes
        cache = memory.attach(store, blocks_per_chunk=BLOCKS_PER_CHUNK)
        assert cache.store([(key(0), None, stored)]).wait(LIMIT_SECONDS).stored == 1
    with open_store(path) as store:
        memory = layout.plan_memory(group.spec, target, BLOCKS)
        cache = memory.attach(store, blocks_per_chunk=BLOCKS_PER_CHUNK)
        assert cache.load([(key(0), None, 0, loaded)]).wait(LIMIT_SECONDS).failed == []
    for layer in made.layer_names:
        for origin, place in zip(stored, loaded, strict=True):
            assert page(target[layer], place) == page(source[layer], origin)
        for place in set(range(BLOCKS)) - set(loaded):
            assert page(target[layer], place) == page(before[layer], place)


@pytest.mark.parametrize("kv_layout", LAYOUTS, ids=lambda kv_layout: kv_layout.name)
@pytest.mark.parametrize("name", SPECS)
def test_data_and_scales_come_back(tmp_path: Path, name: str, kv_layout: KVCacheLayout) -> None:
    spec, token_bytes = SPECS[name]
    block_bytes = len(LAYERS) * spec.num_heads * BLOCK_TOKENS * token_bytes
    check_round_trip(tmp_path, KVCacheGroupSpec(list(LAYERS), spec), kv_layout, block_bytes)


@pytest.mark.parametrize("kv_layout", LAYOUTS, ids=lambda kv_layout: kv_layout.name)
def test_mla_with_a_sparse_indexer(tmp_path: Path, kv_layout: KVCacheLayout) -> None:
    """As vLLM 0.32 serves DeepSeek-V3.2: a latent state of 656 bytes, an indexer's key of 132."""
    block_tokens, state_bytes, indexer_bytes = 64, 656, 128 + 128 // 128 * 4
    latent = dataclasses.replace(mla("fp8_ds_mla", state_bytes), block_size=block_tokens)
    indexer = MLAAttentionSpec(
        block_size=block_tokens,
        num_kv_heads=1,
        max_tp_shards=1,
        head_size=indexer_bytes,
        dtype=torch.uint8,
        cache_role=SparseCacheRole.INDEXER,
    )
    specs: dict[str, KVCacheSpec] = {}
    for index in range(3):
        specs[f"model.layers.{index}.self_attn.attn"] = latent
        specs[f"model.layers.{index}.self_attn.indexer.k_cache"] = indexer
    uniform = UniformTypeKVCacheSpecs.from_specs(specs)
    assert uniform is not None
    block_bytes = 3 * block_tokens * (state_bytes + indexer_bytes)
    check_round_trip(tmp_path, KVCacheGroupSpec(list(specs), uniform), kv_layout, block_bytes)


def test_a_spec_without_its_scales_would_be_noticed() -> None:
    """The control: pages of data alone are smaller than those that are expected above."""
    spec, token_bytes = SPECS["int8_per_token_head"]
    bare = dataclasses.replace(spec, state_content_bytes=None)
    assert bare.page_size_bytes < HEADS * BLOCK_TOKENS * token_bytes == spec.page_size_bytes
