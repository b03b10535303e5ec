"""Which models are stored, and what is said of those that are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvrail._core import ConfigError
from kvrail.vllm import layout
from kvrail.vllm.geometry import GroupGeometry
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
    (group,) = layout.select_groups(config(spec), 64, 1)
    assert group.spec.kv_cache_spec is spec
    assert group.geometry == GroupGeometry(0, 16, 64)


WINDOW = SlidingWindowSpec(**SIZES, sliding_window=40)
LOCAL = ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=128)
STATE = MambaSpec(
    block_size=16, shapes=((3, 8), (4, 2)), dtypes=(torch.float32,) * 2, mamba_cache_mode="align"
)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([WINDOW], [GroupGeometry(0, 16, 64, look_back=39)]),
        ([FULL, WINDOW], [GroupGeometry(0, 16, 64), GroupGeometry(1, 16, 64, look_back=39)]),
        ([LOCAL, FULL], [GroupGeometry(0, 16, 64, segment=128), GroupGeometry(1, 16, 64)]),
        ([FULL, FULL], [GroupGeometry(0, 16, 64), GroupGeometry(1, 16, 64)]),
        (
            [FULL, STATE],
            [GroupGeometry(0, 16, 64), GroupGeometry(1, 16, 64, look_back=1, holds_state=True)],
        ),
        (
            [dataclasses.replace(WINDOW, extra_retained_tokens=3, dcp_sharded=False)],
            [GroupGeometry(0, 16, 64, look_back=42)],
        ),
        # Without vLLM's hybrid manager a window is a field, and the KV of all tokens is kept.
        ([FullAttentionSpec(**SIZES, sliding_window=40)], [GroupGeometry(0, 16, 64)]),
        (
            [UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": WINDOW, "b": WINDOW})],
            [GroupGeometry(0, 16, 64, look_back=39)],
        ),
        (
            [dataclasses.replace(FULL, block_size=32), dataclasses.replace(WINDOW, block_size=8)],
            [GroupGeometry(0, 32, 64), GroupGeometry(1, 8, 64, look_back=39)],
        ),
    ],
)
def test_how_far_each_group_looks_back(specs, expected):
    groups = layout.select_groups(config(*specs), 64, 1)
    assert [group.geometry for group in groups] == expected


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (config(SlidingWindowSpec(**SIZES, sliding_window=1)), ["group 0", "0 tokens"]),
        (
            config(FULL, SlidingWindowMLASpec(**SIZES, sliding_window=64)),
            ["group 1", "SlidingWindowMLASpec", "layer.1.a, layer.1.b"],
        ),
        (
            config(ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=96)),
            ["attention chunks of 96", "64"],
        ),
        (config(FullAttentionSpec(**SIZES, non_causal=True)), ["later ones"]),
        (
            config(dataclasses.replace(STATE, mamba_cache_mode="none")),
            ["group 0", "MambaSpec", "--enable-prefix-caching"],
        ),
        (
            config(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": WINDOW})),
            ["UniformTypeKVCacheSpecs", "equally far"],
        ),
        (
            config(FULL, dataclasses.replace(STATE, mamba_cache_mode="all")),
            ["group 1", "MambaSpec", "align, not all"],
        ),
        (
            config(FULL, dataclasses.replace(STATE, num_speculative_blocks=2)),
            ["group 1", "MambaSpec", "speculative decoding"],
        ),
        (config(FULL, enable_kv_transfer=False), ["for transfer"]),
        (config(), ["no KV cache"]),
    ],
)
def test_everything_else_is_refused_by_name(made, words):
    with pytest.raises(UnsupportedModelError) as caught:
        layout.select_groups(made, 64, 1)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_states_that_vllm_may_find_inside_a_block_are_refused_by_name():
    groups = layout.select_groups(config(FULL, STATE), 64, 1)
    assert layout.chunk_geometry(groups, 64, 16, 16).groups[1].kept_blocks == 1
    with pytest.raises(UnsupportedModelError, match=r"group 1 is MambaSpec .* prefix_match_unit"):
        layout.chunk_geometry(groups, 64, 16, 8)


def test_a_state_is_moved_without_the_padding_of_its_page():
    """As vLLM 0.32 registered Falcon-H1: bytes of both states of a layer, pages padded."""
    page, content = 131072, 19840
    raw = torch.zeros(2 * 4 * page, dtype=torch.int8)
    views = {
        f"layer.0.{name}": raw.as_strided((4, 1, 1, content), (page, content, content, 1), at)
        for name, at in (("a", 0), ("b", 4 * page))
    }
    memory = layout.plan_memory(config(STATE).kv_cache_groups[0], views, 4)
    assert memory.block_bytes == 2 * content
    assert {layer.block_stride for layer in memory.layers} == {page}


def test_states_in_several_tensors_are_layers_of_their_own():
    parts = {name: [torch.zeros(4, 3, 8), torch.zeros(4, 4, 2)] for name in ("a", "b")}
    caches = {f"layer.0.{name}": tensors for name, tensors in parts.items()}
    memory = layout.plan_memory(config(STATE).kv_cache_groups[0], caches, 4)
    assert memory.names == ("layer.0.a.0", "layer.0.a.1", "layer.0.b.0", "layer.0.b.1")
    assert memory.block_bytes == 2 * 4 * (3 * 8 + 4 * 2)


def test_mla_on_a_cpu_is_refused_by_name():
    """There vLLM itself answers wrongly from cached blocks."""
    mla = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.half)
    for spec in (mla, UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": mla})):
        groups = layout.select_groups(config(FULL, spec), 64, 1)
        layout.check_device(groups, "cuda:0")
        with pytest.raises(UnsupportedModelError, match=r"group 1 .* MLA blocks on a CPU"):
            layout.check_device(groups, "cpu")
    layout.check_device(layout.select_groups(config(FULL, WINDOW), 64, 1), "cpu")


def test_memory_of_a_group_follows_its_layer_names():
    group = config(FULL).kv_cache_groups[0]
    backing = torch.zeros(2, 4, 2, 16, 16)
    memory = layout.plan_memory(group, {"layer.0.b": backing[1], "layer.0.a": backing[0]}, 4)
    block_bytes = 2 * 16 * 16 * 4
    assert [layer.offset for layer in memory.layers] == [0, 4 * block_bytes]
    assert memory.block_bytes == 2 * block_bytes
    assert memory.regions == ((backing.data_ptr(), backing.nbytes),)


def test_layers_that_share_kv_are_moved_once():
    group = config(FULL).kv_cache_groups[0]
    tensor = torch.zeros(4, 2, 16, 16)
    memory = layout.plan_memory(group, {"layer.0.a": tensor, "layer.0.b": tensor}, 4)
    assert memory.names == ("layer.0.a",)
    assert memory.block_bytes == 2 * 16 * 16 * 4


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
        layout.check_chunk_size(chunk_size, 128)


def test_tokens_per_block():
    layout.check_chunk_size(256, 128)
    group = config(FULL).kv_cache_groups[0]
    assert layout.tokens_per_block(group, 1) == 16
    assert layout.tokens_per_block(group, 4) == 64


@pytest.mark.parametrize(
    ("blocks", "ranks", "expected"),
    [([16], 1, 256), ([528], 1, 528), ([528, 16], 1, 528), ([48, 32], 1, 288), ([64], 8, 512)],
)
def test_the_chunk_size_that_fits_all_groups(blocks, ranks, expected):
    specs = [dataclasses.replace(FULL, block_size=size) for size in blocks]
    assert layout.fitting_chunk_size(256, config(*specs), ranks) == expected
