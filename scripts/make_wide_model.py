"""Makes the model of the benchmarks of loading: 64 KiB of KV per token and little else.

Its KV cache has 16 layers with 4 heads of 128 in float32, which CPUs compute with more quickly than
with bfloat16; its hidden size is so small that little is left but to read the KV once for each
token, and its weights are random from a fixed seed.
The folder lies in the cache and appears under its name only when it is whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
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
NAME = f"wide-kv-{KV_BYTES_PER_TOKEN >> 10}k-float32"


def write_model(target: Path) -> None:
    """Saves weights and configuration to the folder `target`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
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


def make_wide_model(cache: Path) -> Path:
    """Returns the model's folder in `cache`, made first if it is not there."""
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=cache))
    try:
        write_model(staged)
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
    """Parses the command line and prints the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder to keep it in")
    arguments = parser.parse_args()
    print(make_wide_model(arguments.cache.absolute()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
