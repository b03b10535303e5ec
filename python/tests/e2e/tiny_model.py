"""Builds tiny models with random but fixed weights, small enough to serve in seconds.

The weights are scaled so that attention is sharp: a restored block that holds wrong bytes then
moves the log-probabilities far more than rounding does. The folders are ordinary Hugging Face ones.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYERS = 4
HIDDEN = 256
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = HIDDEN // HEADS
INTERMEDIATE = 512
BOS_ID = 256
EOS_ID = 257
VOCABULARY = 258
MAX_POSITIONS = 8192
# Scores are q.k / sqrt(head size) of two normalised vectors; this gain gives them a standard
# deviation of several units, so that softmax picks a few tokens instead of averaging all of them.
ATTENTION_GAIN = 2.0


def build_llama(folder: Path, seed: int = 7) -> Path:
    """Writes a Llama with full attention in every layer to `folder` and returns the folder."""
    config = _llama_config("LlamaForCausalLM", "llama")
    _write_model(folder, config, _llama_weights(seed))
    return folder


def build_mixed(folder: Path, windowed: Sequence[bool], window: int, seed: int = 7) -> Path:
    """Writes a Llama of which some layers see a window of `window` tokens, others all tokens."""
    config = _llama_config("LlamaForCausalLM", "llama")
    kinds = {True: "sliding_attention", False: "full_attention"}
    config["layer_types"] = [kinds[layer] for layer in windowed]
    config["sliding_window"] = window
    config["num_hidden_layers"] = len(windowed)
    _write_model(folder, config, _llama_weights(seed, len(windowed)))
    return folder


def build_eagle_head(folder: Path, seed: int = 8) -> Path:
    """Writes an EAGLE head of one layer for the Llama above and returns the folder.

    It takes the embedding and the last matrix from the model that it drafts for.
    """
    config = _llama_config("LlamaForCausalLM", "llama") | {"num_hidden_layers": 1}
    layer = {
        name.removeprefix("model."): weight
        for name, weight in _llama_weights(seed, 1).items()
        # What comes out of `fc` is not normalised again.
        if name.startswith("model.layers.") and "input_layernorm" not in name
    }
    _write_model(folder, config, layer | {"fc.weight": _joining_matrix(seed)})
    return folder


def add_mtp_layer(folder: Path, seed: int = 9) -> Path:
    """Adds a layer that predicts one token more to a model, by the names of Ernie 4.5's weights."""
    block = "model.layers.0."
    layer = {
        "model.mtp_block.0." + name.removeprefix(block): weight
        for name, weight in _llama_weights(seed, 1).items()
        if name.startswith(block)
    }
    layer |= {f"model.mtp_{norm}_norm.0.weight": torch.ones(HIDDEN) for norm in ("emb", "hidden")}
    layer |= {"model.mtp_linear_proj.0.weight": _joining_matrix(seed)}
    file = folder / "model.safetensors"
    save_file(load_file(file) | layer, file, metadata={"format": "pt"})
    return folder


def _joining_matrix(seed: int) -> torch.Tensor:
    """What makes one vector of a token's embedding and the vector before it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN, 2 * HIDDEN, generator=generator) / math.sqrt(2 * HIDDEN)


def _llama_config(architecture: str, model_type: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def _llama_weights(seed: int, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        scale = gain / math.sqrt(columns)
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32) * scale

    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, math.sqrt(HIDDEN)),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, 2.0),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN, ATTENTION_GAIN),
            f"{prefix}.self_attn.k_proj.weight": matrix(
                KV_HEADS * HEAD_SIZE, HIDDEN, ATTENTION_GAIN
            ),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return weights


def _write_model(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of the bytes, which every model here has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": MAX_POSITIONS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
