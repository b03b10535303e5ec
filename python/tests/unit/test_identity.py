"""The identity of a namespace: what changes it, what does not, and when there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from identities import LAYERS, HfConfig, Layer, assign, configuration, drafts, identify
from vllm.config.aux_output import AuxOutputConfig
from vllm.config.lora import LoRAConfig
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

from kvrail.vllm import layout
from kvrail.vllm.heads import HeadShare
from kvrail.vllm.identity import (
    attention_backends,
    build_identity,
    engine_none_hash,
    model_name,
    prefix_hash,
)
from kvrail.vllm.layout import UnsupportedModelError
from kvrail.vllm.multimodal import items_are_named


@pytest.fixture
def setup(tmp_path):
    return configuration(tmp_path)


def test_the_same_twice(setup):
    assert identify(setup) == identify(setup)


def test_with_shares_of_heads_all_parallel_sizes_have_one_identity(setup):
    def of_rank(size: int, share: HeadShare) -> dict:
        setup.vllm.parallel_config.tensor_parallel_size = size
        spec = replace(setup.group.kv_cache_spec, num_kv_heads=share.count)
        group = KVCacheGroupSpec(list(LAYERS), spec)
        caches = {name: torch.zeros(4, share.count, 16, 16) for name in LAYERS}
        memory = layout.plan_memory(group, caches, 4)
        return build_identity(setup.vllm, setup.kv, [(group, memory)], 256, heads=[share])

    whole = of_rank(1, HeadShare(0, 2, 2, True))
    assert [of_rank(2, HeadShare(head, head + 1, 2, True)) for head in (0, 1)] == [whole, whole]
    assert whole["parallel"]["tensor"] == "any"
    assert whole["groups"][0]["fields"]["num_kv_heads"] == 2
    assert whole["groups"] == identify(setup)["groups"], "as a single rank has them"
    assert of_rank(2, HeadShare(0, 1, 4, True)) != whole, "another number of heads"
    setup.vllm.parallel_config.pipeline_parallel_size = 2
    assert of_rank(1, HeadShare(0, 2, 2, True)) != whole


def other_weights(setup):
    (setup.folder / "model.safetensors").write_bytes(b"others!")


def other_isa(setup):
    for name in LAYERS:
        setup.vllm.compilation_config.static_forward_context[name] = Layer("amx")


def images(**settings) -> SimpleNamespace:
    """The settings of a model that takes images."""
    return SimpleNamespace(**{"mm_processor_kwargs": None, "video_pruning_rate": None} | settings)


def adapters(**settings) -> LoRAConfig:
    """What an engine that serves the model above makes of adapters."""
    return LoRAConfig(**{"lora_dtype": torch.float32} | settings)


CHANGES = [
    other_weights,
    other_isa,
    assign("chunk_size", 512),
    assign("kv.kv_cache_layout", "BLHNC"),
    assign("vllm.model_config.dtype", torch.bfloat16),
    assign("vllm.model_config.quantization", "fp8"),
    assign("vllm.model_config.hf_overrides", {"rope_theta": 5}),
    assign("vllm.model_config.hf_config", HfConfig(hidden_size=16)),
    assign("vllm.cache_config.cache_dtype", "fp8"),
    assign("vllm.cache_config.prefix_caching_hash_algo", "sha256_cbor"),
    assign("vllm.parallel_config.tensor_parallel_size", 2),
    assign("vllm.parallel_config.pipeline_parallel_size", 2),
    assign("vllm.parallel_config.decode_context_parallel_size", 2),
    assign("vllm.parallel_config.cp_kv_cache_interleave_size", 16),
    assign("vllm.load_config.load_format", "dummy"),
    assign("vllm.model_config.quantization_config", {"ignore": ["lm_head"]}),
    assign("vllm.model_config.multimodal_config", images()),
    assign("vllm.lora_config", adapters(target_modules=["q_proj"])),
    assign("vllm.lora_config", adapters(target_modules=[])),
    assign("vllm.lora_config", adapters(lora_dtype=torch.bfloat16)),
    assign("vllm.lora_config", adapters(enable_tower_connector_lora=True)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_difference_that_matters(setup, change):
    before = identify(setup)
    change(setup)
    assert identify(setup) != before


@pytest.mark.parametrize(
    "change",
    [
        assign("vllm.model_config.max_model_len", 99),
        assign("vllm.model_config.seed", 7),
        assign(
            "vllm.model_config.hf_config",
            HfConfig(hidden_size=8, _name_or_path="b", transformers_version="6"),
        ),
        assign("kv.num_blocks", 4000),
        # Replicas of an engine hold the same bytes under the same names, and so share them; where
        # experts lie does not change what attention keeps.
        assign("vllm.parallel_config.data_parallel_size", 4),
        assign("vllm.parallel_config.data_parallel_rank", 3),
        assign("vllm.parallel_config.enable_expert_parallel", True),
        assign("vllm.lora_config", adapters()),
        # Their layers are in the list of layers.
        assign("vllm.speculative_config", drafts("mtp")),
    ],
    ids=lambda change: change.__name__,
)
def test_a_difference_that_does_not_matter(setup, change):
    before = identify(setup)
    change(setup)
    assert identify(setup) == before


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_states_belong_to_a_platform(setup, monkeypatch, platform):
    spec = MambaSpec(block_size=16, shapes=((2, 4),), dtypes=(torch.float32,))
    groups = [SimpleNamespace(layer_names=LAYERS[:1], kv_cache_spec=spec)]
    gdn = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "GDN_ATTN"))
    setup.vllm.compilation_config.static_forward_context = {LAYERS[0]: gdn}
    monkeypatch.setattr(type(current_platform), "device_type", platform)
    assert attention_backends(setup.vllm, groups) == [f"GDN_ATTN/{platform}"]


def test_stages_of_a_pipeline_agree_and_another_split_differs(setup, monkeypatch):
    setup.vllm.parallel_config.pipeline_parallel_size = 2
    stages = []
    for name in LAYERS:
        setup.group = KVCacheGroupSpec([name], setup.group.kv_cache_spec)
        setup.kv.kv_cache_groups = [setup.group]
        stages.append(identify(setup))
    assert stages[0] == stages[1]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,0")
    assert identify(setup) != stages[0]


def test_stages_whose_layers_are_of_several_kinds_agree(setup):
    """Of one group: which layers there are of each kind differs from stage to stage."""
    setup.vllm.parallel_config.pipeline_parallel_size = 2
    wide = setup.group.kv_cache_spec
    narrow = replace(wide, head_size=4)

    def of_stage(first: int, *specs) -> dict:
        names = [f"model.layers.{first + index}.attn" for index in range(len(specs))]
        by_layer = dict(zip(names, specs, strict=True))
        spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=by_layer)
        group = KVCacheGroupSpec(names, spec)
        for name in names:
            setup.vllm.compilation_config.static_forward_context[name] = Layer("vec")
        caches = {
            name: torch.zeros(4, 2, 16, 2 * spec.head_size) for name, spec in by_layer.items()
        }
        memory = layout.plan_memory(group, caches, 4)
        identity = build_identity(setup.vllm, setup.kv, [(group, memory)], 256)
        assert json.loads(json.dumps(identity)) == identity
        return identity

    stage = of_stage(0, wide, narrow)
    assert of_stage(2, narrow, wide, narrow) == stage
    assert of_stage(2, narrow, replace(wide, head_size=2)) != stage
    assert of_stage(2, narrow) != stage
    setup.vllm.parallel_config.pipeline_parallel_size = 1
    assert of_stage(0, wide, narrow) != of_stage(0, narrow, wide), "a single stage names its layers"


@pytest.mark.parametrize("method", ["mtp", "extract_hidden_states", "draft_model"])
def test_drafts_of_the_targets_checkpoint_are_named_where_layers_are_not(setup, method):
    setup.vllm.parallel_config.pipeline_parallel_size = 2
    without = identify(setup)
    setup.vllm.speculative_config = drafts(method)
    found = identify(setup)
    assert found != without
    setup.vllm.speculative_config = drafts(method, num_speculative_tokens=2)
    assert identify(setup) != found, "some models have a layer for each token"
    setup.vllm.speculative_config = drafts(method)
    setup.vllm.speculative_config.draft_model_config.hf_config = HfConfig(layers=2)
    assert identify(setup) != found


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
def test_drafts_without_layers_change_nothing(setup, method):
    setup.vllm.parallel_config.pipeline_parallel_size = 2
    without = identify(setup)
    setup.vllm.speculative_config = drafts(method)
    assert identify(setup) == without
    setup.vllm.speculative_config = drafts(method, draft_model_config=None)
    assert identify(setup) == without


def test_a_model_on_another_mount_is_the_same(setup):
    before = identify(setup)
    elsewhere = setup.folder.parent / "mount"
    elsewhere.mkdir()
    moved = elsewhere / setup.folder.name
    setup.folder.rename(moved)
    setup.vllm.model_config.model = str(moved)
    assert identify(setup) == before
    assert model_name(setup.vllm) == "tiny-model"


@pytest.mark.parametrize(("length", "expected"), [(4096, False), (4097, True)])
def test_long_rope_depends_on_the_context_length(setup, length, expected):
    setup.vllm.model_config.hf_config = HfConfig(
        original_max_position_embeddings=4096, rope_parameters={"rope_type": "longrope"}
    )
    setup.vllm.model_config.max_model_len = length
    assert identify(setup)["long_rope"] is expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (assign("vllm.weight_transfer_config", object()), "weights change"),
        (assign("vllm.parallel_config.prefill_context_parallel_size", 2), "prefill context"),
        (assign("vllm.model_config.model_weights", "s3://bucket/model"), "s3://bucket/model"),
        *(
            (assign("vllm.load_config.load_format", name), f"load format {name}")
            for name in ("tensorizer", "modelexpress", "npcache", "ipc_cache", "of_a_plugin")
        ),
        (assign("vllm.compilation_config.static_forward_context", {}), "backend of model"),
        (
            assign(
                "vllm.compilation_config.static_forward_context",
                {name: Layer(None) for name in LAYERS},
            ),
            "instruction set",
        ),
        (assign("kv.kv_cache_layout", None), "layout"),
        (lambda setup: (setup.folder / "model.safetensors").unlink(), "no weight files"),
    ],
)
def test_no_identity_without_all_of_it(setup, change, reason):
    change(setup)
    with pytest.raises(UnsupportedModelError, match=reason):
        identify(setup)


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("seed", [None, "17"])
def test_the_worker_derives_the_hash_that_the_engine_uses(monkeypatch, algorithm, seed):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"untouched", raising=False)
    derived = prefix_hash(algorithm)["none_hash"]
    assert engine_none_hash() == b"untouched".hex(), "deriving it must not set it"
    monkeypatch.setattr(kv_cache_utils, "_NONE_HASH_SEED", None)
    kv_cache_utils.init_none_hash(get_hash_fn_by_name(algorithm))
    assert engine_none_hash() == derived


def test_a_random_hash_start_is_refused(monkeypatch):
    pytest.importorskip("xxhash", reason="vLLM's xxhash algorithms need the package xxhash")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UnsupportedModelError, match="set PYTHONHASHSEED"):
        prefix_hash("xxhash")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert prefix_hash("xxhash") == prefix_hash("xxhash")


def other_processor(setup):
    (setup.folder / "preprocessor_config.json").write_text('{"max_pixels": 8}')


@pytest.mark.parametrize(
    "change",
    [
        other_processor,
        assign(
            "vllm.model_config.multimodal_config", images(mm_processor_kwargs={"max_pixels": 8})
        ),
        assign("vllm.model_config.multimodal_config", images(video_pruning_rate=0.5)),
        assign("vllm.model_config.hf_image_processor_config", {"size": 8}),
    ],
    ids=lambda change: change.__name__,
)
def test_what_an_engine_makes_of_images_matters(setup, change):
    """Block hashes name the image, not into how many tokens of which pixels it is cut."""
    setup.vllm.model_config.multimodal_config = images()
    before = identify(setup)
    change(setup)
    assert identify(setup) != before


def test_processor_files_are_nothing_to_models_of_text(setup):
    before = identify(setup)
    other_processor(setup)
    assert identify(setup) == before


@pytest.mark.parametrize(
    ("length", "generation", "override", "expected"),
    [
        (32768, {}, {}, False),
        (32769, {}, {}, True),
        (99999, {"attn_temperature_tuning": False}, {}, False),
        (4096, {"attn_temperature_tuning": False}, {"attn_temperature_tuning": True}, True),
    ],
)
def test_llama_4_scales_queries_by_what_it_decides_when_it_is_made(
    setup, length, generation, override, expected
):
    model = setup.vllm.model_config
    assert "attn_temperature_tuning" not in identify(setup)
    model.hf_text_config = SimpleNamespace(model_type="llama4_text")
    model.max_model_len = length
    model.try_get_generation_config = lambda: dict(generation)
    model.override_generation_config = override
    assert identify(setup)["attn_temperature_tuning"] is expected


def test_pooling_that_needs_the_whole_prompt_is_refused(setup):
    model = setup.vllm.model_config
    model.pooler_config = SimpleNamespace(seq_pooling_type="MEAN")
    model.is_prefix_caching_supported = False
    with pytest.raises(UnsupportedModelError, match="pooling needs all tokens"):
        identify(setup)
    model.is_prefix_caching_supported = True
    identify(setup)


def test_outputs_of_each_token_of_a_prompt_are_refused(setup):
    setup.vllm.aux_output_config = AuxOutputConfig()
    identify(setup)
    setup.vllm.aux_output_config = AuxOutputConfig(enable_return_routed_experts=True)
    with pytest.raises(UnsupportedModelError, match="enable_return_routed_experts"):
        identify(setup)


@pytest.mark.parametrize(
    ("cache_gb", "prefix_caching", "expected"),
    [(4.0, True, True), (4.0, False, True), (0.0, True, True), (0.0, False, False)],
)
def test_images_have_names_of_their_content_while_vllm_needs_them(
    setup, cache_gb, prefix_caching, expected
):
    assert items_are_named(setup.vllm), "a model of text"
    setup.vllm.model_config.multimodal_config = images(mm_processor_cache_gb=cache_gb)
    setup.vllm.cache_config.enable_prefix_caching = prefix_caching
    assert items_are_named(setup.vllm) is expected
