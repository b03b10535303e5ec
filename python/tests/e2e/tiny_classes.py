"""Builds tiny models of other classes than Llama, as sharp as those of `tiny_model`.

transformers knows the names and shapes of each class's weights; the values are drawn here.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_model
import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MiniCPM3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

COMMON: dict[str, Any] = {
    "bos_token_id": tiny_model.BOS_ID,
    "eos_token_id": tiny_model.EOS_ID,
    "head_dim": tiny_model.HEAD_SIZE,
    "hidden_size": tiny_model.HIDDEN,
    "intermediate_size": 256,
    "max_position_embeddings": tiny_model.MAX_POSITIONS,
    "num_attention_heads": tiny_model.HEADS,
    "num_key_value_heads": tiny_model.KV_HEADS,
    "pad_token_id": None,
    "vocab_size": tiny_model.VOCABULARY,
}


def build(make_config: Callable[[], PretrainedConfig], folder: Path, seed: int = 7) -> Path:
    """Writes the model that the configuration describes to `folder` and returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(), dtype=torch.float32)
    for name, weight in model.named_parameters():
        _draw(name, weight.data)
    model.save_pretrained(folder)
    tiny_model.write_tokenizer(folder)
    return folder


def _draw(name: str, weight: torch.Tensor) -> None:
    """Draws a matrix, with a gain where it makes attention or the answer sharp."""
    if name.endswith(
        ("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")
    ):
        # Where queries and keys are normalised, their projections cannot make attention sharp.
        weight += 1.0
    elif name.endswith("sinks"):
        weight.normal_()
    elif weight.dim() > 1 and "conv1d" not in name:
        # Experts' matrices, in three dimensions, are stored transposed; filters are not.
        is_transposed = weight.dim() == 3 and "conv" not in name
        inputs = weight.shape[1] if is_transposed else weight.shape[-1]
        sharp = name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight"))
        gain = tiny_model.ATTENTION_GAIN if sharp or "embed" in name else 1.0
        weight.normal_(std=gain / math.sqrt(inputs))


def gemma3() -> PretrainedConfig:
    """Five layers with a window to one that sees all tokens."""
    return Gemma3TextConfig(**COMMON, num_hidden_layers=6, sliding_window=300)


def gemma3n() -> PretrainedConfig:
    """Ten layers, of which the last five use the KV cache of two of the first five."""
    return Gemma3nTextConfig(
        **COMMON,
        num_hidden_layers=10,
        num_kv_shared_layers=5,
        sliding_window=300,
        vocab_size_per_layer_input=tiny_model.VOCABULARY,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
    )


def gpt_oss() -> PretrainedConfig:
    """Experts, attention sinks, and a window in every other layer."""
    return GptOssConfig(
        **COMMON,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
    )


def llama4() -> PretrainedConfig:
    """Three layers of chunked local attention to one that sees all tokens; experts in two."""
    return Llama4TextConfig(
        **COMMON,
        num_hidden_layers=4,
        attention_chunk_size=512,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=256,
        num_local_experts=2,
    )


def minicpm3() -> PretrainedConfig:
    """Keys and values out of a latent vector, kept by vLLM as those of plain attention."""
    sizes = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
    own = {"num_key_value_heads": tiny_model.HEADS, "v_head_dim": tiny_model.HEAD_SIZE}
    return MiniCPM3Config(**COMMON | sizes | own, num_hidden_layers=4)


def mixtral() -> PretrainedConfig:
    """Experts, and attention to all tokens in every layer."""
    return MixtralConfig(**COMMON, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2)


def build_ernie_mtp(folder: Path) -> Path:
    """Writes Ernie 4.5, experts behind a plain layer, with a layer that drafts (MTP)."""
    return tiny_model.add_mtp_layer(build(_ernie, folder))


def _ernie() -> PretrainedConfig:
    return Ernie4_5_MoeConfig(
        **COMMON | {"intermediate_size": tiny_model.INTERMEDIATE},
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        moe_intermediate_size=64,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        tie_word_embeddings=False,
    )


def falcon_h1() -> PretrainedConfig:
    """Each layer has attention and a mamba state."""
    return FalconH1Config(
        **COMMON, num_hidden_layers=2, mamba_d_ssm=256, mamba_n_heads=8, mamba_d_state=16
    )


def lfm2() -> PretrainedConfig:
    """Short convolutions, whose state is the two tokens before, and attention, in turn."""
    return Lfm2Config(
        **COMMON | {"intermediate_size": tiny_model.INTERMEDIATE},
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        # What vLLM reads and transformers' class does not have.
        block_auto_adjust_ff_dim=False,
        block_dim=tiny_model.HIDDEN,
        conv_dim=tiny_model.HIDDEN,
    )


def qwen3_next() -> PretrainedConfig:
    """A gated delta network and attention; experts. vLLM's CPU build needs bfloat16.

    The state of one head of 64 is no larger than a block of 128 tokens of the
    other layer, so that vLLM need not make its blocks larger. That holds in float32 as well, in
    which vLLM keeps the states on processors with AVX512-BF16, whatever the model's type is.
    """
    return Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=64,
        num_experts=2,
        num_experts_per_tok=1,
        shared_expert_intermediate_size=64,
    )
