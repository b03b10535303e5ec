"""Which models and requests LMCache's files can hold, and the order of their KV."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from kvrail.vllm.layout import UnsupportedModelError
from kvrail.vllm.lmcache_files import TokenOrder, request_problem, token_order
from kvrail.vllm.lmcache_hash import LmcacheHasher

BLOCKS, TOKENS, HEADS, SIZE = 3, 4, 2, 8


def full_spec(**changes: Any) -> FullAttentionSpec:
    fields = {
        "block_size": TOKENS,
        "num_kv_heads": HEADS,
        "head_size": SIZE,
        "dtype": torch.float32,
    }
    return FullAttentionSpec(**(fields | changes))


def view(heads_first: bool) -> torch.Tensor:
    """A layer as vLLM hands it out: [block, head, token, content], tokens or heads outermost."""
    numbers = torch.arange(BLOCKS * HEADS * TOKENS * 2 * SIZE, dtype=torch.float32)
    if heads_first:
        return numbers.view(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    return numbers.view(BLOCKS, TOKENS, HEADS, 2 * SIZE).transpose(1, 2)


def in_order(order: TokenOrder, block: torch.Tensor) -> torch.Tensor:
    """The elements of a block by side, token, head and element, as the order has them."""
    flat = torch.as_strided(block, (block.numel(),), (1,), block.storage_offset())
    item = order.element_bytes
    found = [
        [
            [
                [
                    flat[(start + h * head + t * token + e * element) // item]
                    for e in range(order.head_size)
                ]
                for h in range(order.heads)
            ]
            for t in range(order.tokens)
        ]
        for start, head, token, element in order.sides
    ]
    return torch.tensor(found)


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_k_and_v_are_beside_each_other_as_the_backends_split_them(
    backend: str, heads_first: bool
) -> None:
    cache = view(heads_first)
    order = token_order(full_spec(), cache, [backend])
    # As the backends read it.
    keys, values = cache.transpose(1, 2).split(SIZE, dim=-1)
    for block in range(BLOCKS):
        expected = torch.stack([keys[block], values[block]])
        assert torch.equal(in_order(order, cache[block]), expected)


def test_the_cpu_backend_keeps_k_by_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its own operator puts into a block is found by the order."""
    import vllm._custom_ops as ops

    tokens, size = 32, 32
    cache = torch.zeros(2, HEADS, tokens, 2 * size)
    order = token_order(full_spec(block_size=tokens, head_size=size), cache, ["CPU_ATTN/vec"])
    source = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(tokens, HEADS, size, generator=source) for _ in range(2))
    key_cache, value_cache = cache.view(2, HEADS, 2 * tokens, size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, key_cache, value_cache, torch.arange(tokens, 2 * tokens), "vec"
    )
    assert torch.equal(in_order(order, cache[1]), torch.stack([keys, values]))


def test_mla_has_one_side() -> None:
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=SIZE, dtype=torch.bfloat16)
    cache = torch.zeros(BLOCKS, 1, TOKENS, SIZE, dtype=torch.bfloat16)
    order = token_order(spec, cache, ["FLASHMLA"])
    assert order.sides == ((0, TOKENS * SIZE * 2, SIZE * 2, 2),)


@pytest.mark.parametrize(
    ("backends", "changes"),
    [
        (["CPU_ATTN/amx"], {}),
        (["FLASHINFER"], {}),
        (["FLASH_ATTN", "TRITON_ATTN"], {}),
        (["FLASH_ATTN"], {"head_size_v": SIZE // 2}),
        (["FLASH_ATTN"], {"block_size": 2 * TOKENS}),
    ],
)
def test_an_order_that_is_not_known_is_refused(
    backends: list[str], changes: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match="order of KV"):
        token_order(full_spec(**changes), view(False), backends)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"lora_request": object()}, "LoRA"),
        ({"cache_salt": "blue"}, "cache_salt"),
        ({"mm_features": [object()]}, "multimodal inputs"),
        ({"prompt_embeds": object()}, "prompt embeddings"),
        ({"kv_transfer_params": {"lmcache.tag.user": "a"}}, "tags of LMCache"),
        ({"kv_transfer_params": {"kvrail_explain": True}}, None),
    ],
)
def test_what_hashes_of_tokens_do_not_cover_is_left_alone(
    changes: dict[str, Any], problem: str | None
) -> None:
    request = {
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
        "prompt_embeds": None,
        "kv_transfer_params": None,
    }
    assert request_problem(SimpleNamespace(**(request | changes))) == problem


def test_hashes_without_a_fixed_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for algorithm in ("builtin", "xxhash"):
        with pytest.raises(UnsupportedModelError, match="PYTHONHASHSEED"):
            LmcacheHasher.of_process(algorithm)
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    with pytest.raises(UnsupportedModelError, match="PYTHONHASHSEED"):
        LmcacheHasher.of_process("builtin")


def test_a_hasher_goes_on_from_the_key_that_an_identity_has() -> None:
    for algorithm, start in (("builtin", -5), ("sha256", 2**64 - 5)):
        hasher = LmcacheHasher(algorithm, start)
        again = LmcacheHasher.from_key(algorithm, hasher.start_key)
        first = hasher.key([1, 2, 3], None)
        assert again.key([1, 2, 3], None) == first and len(first) == 8
        assert again.key([4], first) == hasher.key([4], first) != first
