"""The identity of a namespace: everything that must be equal for KV cache bytes to be
interchangeable.

Two instances that differ in any of it use different directories, so a wrong block cannot be found
rather than having to be recognised. The worker builds the identity, because only there the
attention backend and the tensors exist; the scheduler takes it over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrail.vllm.fingerprint import FingerprintError, resolve_model_path
from kvrail.vllm.layout import UnsupportedModelError
from kvrail.vllm.lmcache_hash import PREFIX, LmcacheHasher
from kvrail.vllm.multimodal import processing
from kvrail.vllm.version import parse
from kvrail.vllm.weights_source import check_source, draft_weights, tower_weights, weights

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from kvrail.kv_cache import KvMemory
    from kvrail.vllm.heads import HeadShare
    from kvrail.vllm.lmcache_files import LmcacheFiles

# Keys of a model's configuration that say where it came from, not what it computes.
_ORIGIN_KEYS = frozenset({"transformers_version"})

# Methods of speculative decoding whose drafts have no KV cache.
_DRAFTS_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})


def model_name(vllm_config: VllmConfig) -> str:
    """The model's name; of a local path only the last part, so that mounts may differ."""
    model = vllm_config.model_config.model
    local = Path(model).expanduser()
    return local.resolve().name if local.exists() else model


def build_identity(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    groups: Sequence[tuple[KVCacheGroupSpec, KvMemory]],
    chunk_size: int,
    *,
    lmcache: tuple[LmcacheHasher, LmcacheFiles] | None = None,
    heads: Sequence[HeadShare] | None = None,
) -> dict[str, Any]:
    """The identity as plain JSON values, for all KV cache groups with their memory.

    `lmcache` is given where chunk keys are LMCache's hashes: then the identity also says what its
    files of this model are, so that they can be copied without an engine.

    With ``heads``, this rank's of each group, it is the same for all tensor-parallel sizes.

    Raises ``UnsupportedModelError`` when a part of it cannot be known.
    """
    from vllm import __version__ as vllm_version

    check_source(vllm_config)
    parallel = vllm_config.parallel_config
    if parallel.prefill_context_parallel_size > 1:
        raise UnsupportedModelError("prefill context parallelism is not supported")
    _check_outputs(vllm_config)
    model = vllm_config.model_config
    number = parse(vllm_version)
    shares: Sequence[HeadShare | None] = heads or [None] * len(groups)
    if lmcache is None:
        hashing = prefix_hash(vllm_config.cache_config.prefix_caching_hash_algo)
    else:
        hasher = lmcache[0]
        algorithm = PREFIX + hasher.algorithm
        hashing = {"algorithm": algorithm, "none_hash": hasher.start_key.hex()}
    files = {} if lmcache is None else {"lmcache": lmcache[1].as_json()}
    return files | {
        "engine": "vllm",
        "engine_version": ".".join(map(str, number)) if number else vllm_version,
        "model": model_name(vllm_config),
        "model_config": _model_config_hash(model),
        "weights": weights(model, vllm_config.load_config),
        "draft_weights": draft_weights(vllm_config),
        "long_rope": _uses_long_rope(model),
        **_only_where_set(vllm_config, model),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "attention": attention_backends(vllm_config, [group for group, _ in groups]),
        "layout": layout_name(vllm_config, kv_cache_config),
        "chunk_size": chunk_size,
        "groups": [
            _group(vllm_config, group, memory, share)
            for (group, memory), share in zip(groups, shares, strict=True)
        ],
        "parallel": {
            "tensor": "any" if heads else parallel.tensor_parallel_size,
            "pipeline": parallel.pipeline_parallel_size,
            "decode_context": parallel.decode_context_parallel_size,
            "interleave": parallel.cp_kv_cache_interleave_size,
        },
        "prefix_hash": hashing | _hash_tokens(vllm_config, kv_cache_config),
    }


def prefix_hash(algorithm: str) -> dict[str, str]:
    """vLLM's prefix-hash algorithm and the value its chains start from.

    A worker process never initialises that value, so it is derived here the way vLLM's engine does.
    Raises ``UnsupportedModelError`` for an algorithm whose start is random in each process.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    hash_function = get_hash_fn_by_name(algorithm)
    seed = kv_cache_utils.resolve_none_hash_seed(hash_function)
    if seed != kv_cache_utils.resolve_none_hash_seed(hash_function):
        raise UnsupportedModelError(
            f"prefix_caching_hash_algo {algorithm} starts from a random value in each process; set "
            "PYTHONHASHSEED to the same number for all instances, or use sha256"
        )
    return {"algorithm": algorithm, "none_hash": bytes(hash_function(seed)).hex()}


def _hash_tokens(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Tokens of one block hash, where they do not follow from the only group's block size."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    if len(kv_cache_config.kv_cache_groups) == 1:
        return {}
    _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return {"block_tokens": hash_tokens}


def engine_none_hash() -> str | None:
    """The value that this process's vLLM starts its hash chains from; None before vLLM set it."""
    from vllm.v1.core import kv_cache_utils

    value = getattr(kv_cache_utils, "NONE_HASH", None)
    return None if value is None else bytes(value).hex()


def _drafts_of_target(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """What drafts are whose layers are in the target's checkpoint, where no layer is named.

    With one stage the identity lists them with all layers. With several only the last stage has
    them, and its files are longer than those of an engine without drafts.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.parallel_config.pipeline_parallel_size == 1:
        return None
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft.model != vllm_config.model_config.model:
        return None
    if str(speculative.method) in _DRAFTS_WITHOUT_KV:
        return None
    return {
        "method": speculative.method,
        "model_config": _model_config_hash(draft),
        # Some models have a layer for each.
        "tokens": speculative.num_speculative_tokens,
    }


def _model_config_hash(model: ModelConfig) -> str:
    # What a callable changed is visible in the configuration itself.
    overrides = None if callable(model.hf_overrides) else model.hf_overrides
    text = json.dumps(
        [_without_origin(model.hf_config.to_dict()), overrides], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _without_origin(entry)
            for key, entry in value.items()
            if not str(key).startswith("_") and key not in _ORIGIN_KEYS
        }
    if isinstance(value, list | tuple):
        return [_without_origin(entry) for entry in value]
    return value


def _check_outputs(vllm_config: VllmConfig) -> None:
    """Refuses engines that need each token of a prompt computed, whatever is in a cache.

    vLLM knows it of its own prefix cache, and does not ask connectors.
    """
    model = vllm_config.model_config
    pooler = getattr(model, "pooler_config", None)
    if pooler is not None and not model.is_prefix_caching_supported:
        raise UnsupportedModelError(
            "its pooling needs all tokens of a prompt computed at once, as vLLM says of its own "
            "prefix cache"
        )
    outputs = getattr(vllm_config, "aux_output_config", None)
    if outputs is not None and outputs.enabled:
        raise UnsupportedModelError(
            "enable_return_routed_experts needs each token of a prompt computed in this process"
        )


def _only_where_set(vllm_config: VllmConfig, model: ModelConfig) -> dict[str, Any]:
    """What few models have; left out of the identity of all others."""
    parts = {
        "quantization_config": _quantization(model),
        "attn_temperature_tuning": _temperature_tuning(model),
        "multimodal": processing(model, _folder(vllm_config, model)),
        "tower_weights": tower_weights(vllm_config),
        "drafts": _drafts_of_target(vllm_config),
        **_adapters(vllm_config, model),
    }
    return {name: part for name, part in parts.items() if part is not None}


def _folder(vllm_config: VllmConfig, model: ModelConfig) -> Path:
    try:
        return resolve_model_path(model.model, model.revision, vllm_config.load_config.download_dir)
    except FingerprintError:
        # Of weights that were never files, such as dummy ones.
        return Path(model.model)


def _adapters(vllm_config: VllmConfig, model: ModelConfig) -> dict[str, Any]:
    """What an engine makes of the same files of an adapter, where it is not what others do."""
    config = getattr(vllm_config, "lora_config", None)
    if config is None:
        return {}
    modules = config.target_modules
    return {
        "lora_target_modules": None if modules is None else sorted(set(modules)),
        "lora_dtype": None if config.lora_dtype == model.dtype else str(config.lora_dtype),
        "lora_towers": config.enable_tower_connector_lora or None,
    }


def _quantization(model: ModelConfig) -> str | None:
    """What the user set for quantization at loading, beyond the method's name."""
    config = getattr(model, "quantization_config", None)
    if config is None:
        return None
    if not isinstance(config, dict):
        config = {name: getattr(config, name) for name in sorted(vars(config))}
    return json.dumps(config, sort_keys=True, default=repr)


def _temperature_tuning(model: ModelConfig) -> bool | None:
    """Whether Llama 4 scales queries by their position, which it decides when it is made.

    As in ``Llama4ForCausalLM``: from the generation configuration, else for contexts above 32,768.
    """
    text = getattr(model, "hf_text_config", None)
    if not str(getattr(text, "model_type", "")).startswith("llama4"):
        return None
    generation = {**model.try_get_generation_config(), **model.override_generation_config}
    return bool(generation.get("attn_temperature_tuning", model.max_model_len > 32768))


def _uses_long_rope(model: ModelConfig) -> bool | None:
    """Which of LongRoPE's two tables vLLM uses: one way the context length changes K."""
    limits = _long_rope_limits(model.hf_config.to_dict())
    return model.max_model_len > min(limits) if limits else None


def _long_rope_limits(config: dict[str, Any]) -> list[int]:
    outer = config.get("original_max_position_embeddings")
    limits = []
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        if key in ("rope_parameters", "rope_scaling"):
            kind = value.get("rope_type", value.get("type"))
            limit = value.get("original_max_position_embeddings", outer)
            if kind in ("longrope", "su") and limit is not None:
                limits.append(int(limit))
        else:
            limits.extend(_long_rope_limits(value))
    return limits


def attention_backends(vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> list[str]:
    """Names of the attention backends, which order the bytes inside a block.

    vLLM's CPU backend packs keys differently for each instruction set, so the instruction set that
    it chose is part of the name. Backends of states have one name on all platforms, whose kernels
    keep the axes of a state in different orders (GDN), so the platform is part of theirs.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec

    layers = vllm_config.compilation_config.static_forward_context
    names = set()
    named = ((group.kv_cache_spec, name) for group in groups for name in group.layer_names)
    for spec, layer_name in named:
        layer = layers.get(layer_name)
        if layer is None:
            raise UnsupportedModelError(f"the attention backend of {layer_name} is not known")
        name = layer.get_attn_backend().get_name()
        if name == "CPU_ATTN":
            instruction_set = getattr(layer, "isa", None)
            if instruction_set is None:
                raise UnsupportedModelError(f"the instruction set of {layer_name} is not known")
            name = f"{name}/{instruction_set}"
        if isinstance(spec, MambaSpec):
            name = f"{name}/{current_platform.device_type}"
        names.add(name)
    return sorted(names)


def layout_name(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """The KV cache layout that vLLM chose; ``UnsupportedModelError`` when it has not."""
    name = kv_cache_config.kv_cache_layout or vllm_config.cache_config.kv_cache_layout
    if name is None:
        raise UnsupportedModelError("vLLM has not resolved a KV cache layout")
    return str(name)


def _group(
    vllm_config: VllmConfig, group: KVCacheGroupSpec, memory: KvMemory, share: HeadShare | None
) -> dict[str, Any]:
    spec = group.kv_cache_spec
    entry: dict[str, Any] = {
        "spec": type(spec).__name__,
        "fields": _fields(spec),
    }
    sizes = [layer.block_bytes for layer in memory.layers]
    if share is not None:
        # As a single rank would have them.
        entry["fields"] = _with_all_heads(entry["fields"], share.total)
        sizes = [size // share.count * share.total for size in sizes]
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        entry["layers"] = [[name, size] for name, size in zip(memory.names, sizes, strict=True)]
    else:
        # Every stage has other layers but one identity must hold for all, so the split stands in.
        entry["fields"] = _without_layers(entry["fields"])
        entry["partition"] = os.environ.get("VLLM_PP_LAYER_PARTITION")
        entry["hidden_layers"] = vllm_config.model_config.get_total_num_hidden_layers()
        entry["layer_block_bytes"] = sorted(set(sizes))
    return entry


def _fields(spec: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}


def _without_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec; of specs by layer only which ones there are."""
    return {
        key: _distinct(value.values()) if isinstance(value, dict) else value
        for key, value in fields.items()
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    by_text = {json.dumps(value, sort_keys=True): value for value in values}
    return [by_text[text] for text in sorted(by_text)]


def _with_all_heads(fields: Any, total: int) -> Any:
    """The fields of a spec, and of the specs in it, with the number of heads of all ranks."""
    if isinstance(fields, dict):
        return {
            key: total if key == "num_kv_heads" else _with_all_heads(value, total)
            for key, value in fields.items()
        }
    if isinstance(fields, list):
        return [_with_all_heads(value, total) for value in fields]
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        # One spec for each layer, where layers of a group differ in size.
        return {key: [type(spec).__name__, _fields(spec)] for key, spec in value.items()}
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
