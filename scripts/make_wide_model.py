"""Makes the models of the benchmarks: one with 64 KiB of KV per token and one with many layers.

They are in float32, which CPUs compute with more quickly than with bfloat16; their hidden size is
so small that little is left but to read the KV once for each token, and their weights are random
from a fixed seed. A folder lies in the cache and appears under its name only when it is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from make_model import cache_folder

LAYERS = 16
KV_HEADS = 4
HEAD_SIZE = 128
BYTES_PER_VALUE = 4
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_SIZE * BYTES_PER_VALUE
HIDDEN = 128
VOCABULARY = 1024
MAX_POSITIONS = 16384
SEED = 7


@dataclass(frozen=True)
class Shape:
    """A model's name, and the size of its KV cache."""

    name: str
    layers: int
    kv_heads: int
    head_size: int


WIDE = Shape(f"wide-kv-{KV_BYTES_PER_TOKEN >> 10}k-float32", LAYERS, KV_HEADS, HEAD_SIZE)
# As many layers as Llama-3.1-8B has.
DEEP = Shape("wide-kv-32-layers-float32", 32, 1, 64)


def write_model(target: Path, shape: Shape) -> None:
    """Saves weights and configuration to the folder `target`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.kv_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_POSITIONS,
        # Wide enough that a wrong KV gives another token.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(target)


def make_wide_model(cache: Path, shape: Shape = WIDE) -> Path:
    """Returns a model's folder in `cache`, made first if it is not there."""
    target = cache / shape.name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{shape.name}-", dir=cache))
    try:
        write_model(staged, shape)
        staged.chmod(0o755)
        staged.rename(target)
    except OSError:
        # Another process may have been quicker; both make the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def main() -> int:
    """Parses the command line and prints the models' folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder to keep it in")
    arguments = parser.parse_args()
    for shape in (WIDE, DEEP):
        print(make_wide_model(arguments.cache.absolute(), shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
