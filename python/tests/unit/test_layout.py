"""Which models are stored, and what is said of those that are not."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvrail._core import ConfigError
from kvrail.vllm import layout
from kvrail.vllm.layout import UnsupportedModelError

SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)


def config(*specs, **group) -> KVCacheConfig:
    groups = [
        KVCacheGroupSpec([f"layer.{index}.a", f"layer.{index}.b"], spec, **group)
        for index, spec in enumerate(specs)
    ]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    "spec", [FULL, MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.half)]
)
def test_full_attention_and_mla_are_stored(spec):
    assert layout.select_group(config(spec)).kv_cache_spec is spec


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (config(SlidingWindowSpec(**SIZES, sliding_window=64)), ["group 0", "SlidingWindowSpec"]),
        (
            config(FULL, SlidingWindowSpec(**SIZES, sliding_window=64)),
            ["group 1", "SlidingWindowSpec", "layer.1.a, layer.1.b"],
        ),
        (config(FullAttentionSpec(**SIZES, sliding_window=64)), ["sliding window of 64"]),
        (config(FullAttentionSpec(**SIZES, attention_chunk_size=32)), ["chunks of 32"]),
        (config(FullAttentionSpec(**SIZES, non_causal=True)), ["later ones"]),
        (
            config(MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,))),
            ["MambaSpec"],
        ),
        (
            config(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"layer.0.a": FULL})),
            ["UniformTypeKVCacheSpecs"],
        ),
        (config(FULL, FULL), ["2 KV cache groups"]),
        (config(FULL, enable_kv_transfer=False), ["for transfer"]),
        (config(), ["0 KV cache groups"]),
    ],
)
def test_everything_else_is_refused_by_name(made, words):
    with pytest.raises(UnsupportedModelError) as caught:
        layout.select_group(made)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_memory_of_a_group_follows_its_layer_names():
    group = config(FULL).kv_cache_groups[0]
    backing = torch.zeros(2, 4, 2, 16, 16)
    memory = layout.plan_memory(group, {"layer.0.b": backing[1], "layer.0.a": backing[0]}, 4)
    block_bytes = 2 * 16 * 16 * 4
    assert [layer.offset for layer in memory.layers] == [0, 4 * block_bytes]
    assert memory.block_bytes == 2 * block_bytes
    assert memory.regions == ((backing.data_ptr(), backing.nbytes),)


def test_missing_and_unsuitable_tensors():
    group = config(FULL).kv_cache_groups[0]
    good = torch.zeros(4, 8)
    with pytest.raises(UnsupportedModelError, match=r"layer\.0\.b"):
        layout.plan_memory(group, {"layer.0.a": good}, 4)
    with pytest.raises(UnsupportedModelError, match="KV cache on meta"):
        layout.plan_memory(group, {"layer.0.a": good, "layer.0.b": good.to("meta")}, 4)


@pytest.mark.parametrize("chunk_size", [0, 100, 64, 255])
def test_a_chunk_size_that_is_no_multiple_of_the_block_size(chunk_size):
    expected = rf"`chunk_size` = {chunk_size}: expected a multiple of .* 128"
    with pytest.raises(ConfigError, match=expected):
        layout.blocks_per_chunk(chunk_size, 128)


def test_blocks_per_chunk():
    assert layout.blocks_per_chunk(256, 128) == 2
    group = config(FULL).kv_cache_groups[0]
    assert layout.tokens_per_block(group, 1) == 16
    assert layout.tokens_per_block(group, 4) == 64
