"""A configuration with the fields of vLLM's that an identity is made of, for the tests of it."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvrail.vllm import layout
from kvrail.vllm.identity import build_identity

LAYERS = ["model.layers.0.attn", "model.layers.1.attn"]


class Layer:
    def __init__(self, isa: str | None) -> None:
        if isa is not None:
            self.isa = isa

    def get_attn_backend(self):
        return SimpleNamespace(get_name=lambda: "CPU_ATTN")


class HfConfig:
    def __init__(self, **values) -> None:
        self.values = values

    def to_dict(self) -> dict:
        return copy.deepcopy(self.values)


def configuration(tmp_path) -> SimpleNamespace:
    """Of a model with two layers, in a folder with its weights."""
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    model = SimpleNamespace(
        model=str(folder),
        model_weights="",
        revision=None,
        seed=0,
        dtype=torch.float32,
        quantization=None,
        hf_overrides={},
        hf_config=HfConfig(hidden_size=8, _name_or_path="a", transformers_version="5"),
        max_model_len=4096,
        get_total_num_hidden_layers=lambda: 2,
    )
    config = SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(
            load_format="auto", download_dir=None, model_loader_extra_config={}
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", prefix_caching_hash_algo="sha256", kv_cache_layout=None
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        compilation_config=SimpleNamespace(
            static_forward_context={name: Layer("vec") for name in LAYERS}
        ),
        speculative_config=None,
        weight_transfer_config=None,
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    group = KVCacheGroupSpec(list(LAYERS), spec)
    kv_config = KVCacheConfig(
        num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[group], kv_cache_layout="LBNHC"
    )
    return SimpleNamespace(vllm=config, kv=kv_config, group=group, folder=folder, chunk_size=256)


def identify(setup) -> dict:
    draft = getattr(setup.vllm.speculative_config, "draft_model_config", None)
    if draft is not None and draft.model is None:
        draft.model = setup.vllm.model_config.model
    caches = {name: torch.zeros(4, 2, 16, 16) for name in LAYERS}
    memory = layout.plan_memory(setup.group, caches, 4)
    identity = build_identity(setup.vllm, setup.kv, [(setup.group, memory)], setup.chunk_size)
    assert json.loads(json.dumps(identity)) == identity, "an identity is plain JSON"
    return identity


def assign(path: str, value):
    def change(setup):
        target = setup
        *parents, last = path.split(".")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)

    change.__name__ = path
    return change


def drafts(method: str, **settings) -> SimpleNamespace:
    """Speculative decoding with drafts out of the target's checkpoint."""
    config = HfConfig(model_type=f"tiny_{method}")
    draft = SimpleNamespace(model=None, hf_config=config, hf_overrides=lambda config: config)
    fields = {"num_speculative_tokens": 1, "draft_model_config": draft} | settings
    return SimpleNamespace(method=method, **fields)
