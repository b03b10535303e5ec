"""Which heads a rank has, and where files cannot be named by them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvrail.vllm.heads import RankBoundError, head_shares

BLOCKS = 4
TOKENS = 16
HEAD_SIZE = 8


def config(size: int, heads: int = 8, **parallel) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(model="m", get_total_num_kv_heads=lambda: heads),
        parallel_config=SimpleNamespace(
            **{"tensor_parallel_size": size, "decode_context_parallel_size": 1} | parallel
        ),
        speculative_config=None,
    )


def full(heads: int, **fields) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=heads, head_size=HEAD_SIZE, dtype=torch.float32, **fields
    )


def mla(**fields) -> MLAAttentionSpec:
    return MLAAttentionSpec(
        block_size=TOKENS, num_kv_heads=1, head_size=HEAD_SIZE, dtype=torch.float32, **fields
    )


def tensor(heads: int) -> torch.Tensor:
    return torch.zeros(BLOCKS, heads, TOKENS, 2 * HEAD_SIZE)


def ask(vllm_config, specs, rank=0, layout="LBHNC", tensors=None):
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    tensors = tensors or [tensor(spec.num_kv_heads) for spec in specs]
    caches = {f"layer.{index}": one for index, one in enumerate(tensors)}
    kv_config = SimpleNamespace(num_blocks=BLOCKS)
    shares = head_shares(vllm_config, kv_config, groups, caches, rank, layout)
    return [(share.first, share.end, share.total, share.is_first) for share in shares]


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_ranks_have_consecutive_heads(layout):
    assert ask(config(1), [full(8)], layout=layout) == [(0, 8, 8, True)]
    found = [ask(config(4), [full(2)], rank, layout)[0] for rank in range(4)]
    assert found == [(0, 2, 8, True), (2, 4, 8, True), (4, 6, 8, True), (6, 8, 8, True)]


def test_of_replicas_the_first_stores():
    found = [ask(config(8, heads=2), [full(1)], rank)[0] for rank in range(8)]
    assert [share[:2] for share in found] == [(0, 1)] * 4 + [(1, 2)] * 4
    assert [share[3] for share in found] == [True, False, False, False] * 2


def test_groups_have_shares_of_their_own():
    window = SlidingWindowSpec(
        block_size=TOKENS,
        num_kv_heads=4,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        sliding_window=64,
    )
    specs = [mla(max_tp_shards=1), window]
    assert ask(config(2), specs, 1) == [(0, 1, 1, False), (4, 8, 8, True)]


def test_the_latent_of_mla_is_one_head_in_any_layout():
    assert ask(config(4), [mla(max_tp_shards=1)], 2, "LBNHC") == [(0, 1, 1, False)]


REFUSED = [
    (config(2), full(4), "LBNHC", None, "LBNHC has no heads outermost"),
    (config(1), full(8), "BLNHC", None, "BLNHC has no heads outermost"),
    (config(2, decode_context_parallel_size=2), full(4), "LBHNC", None, "context parallel"),
    (config(2), full(3), "LBHNC", None, "3 KV heads on a rank, of 8"),
    (config(3, heads=8), full(2), "LBHNC", None, "8 KV heads on 3 ranks"),
    (config(2), mla(), "LBHNC", None, "of None"),
    (config(2), full(4, num_head_slots=8), "LBHNC", None, "other slots"),
    (config(2), full(4, kv_quant_mode=KVQuantMode.NVFP4), "LBHNC", None, "NVFP4"),
    (
        config(2),
        full(4),
        "LBHNC",
        torch.zeros(BLOCKS, TOKENS, 4, 2 * HEAD_SIZE).transpose(1, 2),
        "not outermost",
    ),
    (config(2), full(4), "LBHNC", torch.zeros(2 * BLOCKS, 4, 8, 16), "not outermost"),
]


@pytest.mark.parametrize(("vllm", "spec", "layout", "memory", "reason"), REFUSED)
def test_what_is_not_sure_stays_with_its_parallel_size(vllm, spec, layout, memory, reason):
    with pytest.raises(RankBoundError, match=reason):
        ask(vllm, [spec], layout=layout, tensors=None if memory is None else [memory])


def test_a_draft_model_of_its_own_stays_with_its_parallel_size():
    vllm = config(2)
    vllm.speculative_config = SimpleNamespace(draft_model_config=SimpleNamespace(model="m"))
    assert ask(vllm, [full(4)]) == [(0, 4, 8, True)]
    vllm.speculative_config.draft_model_config.model = "draft"
    with pytest.raises(RankBoundError, match="draft"):
        ask(vllm, [full(4)])
