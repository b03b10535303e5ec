"""``kvrail-explain``: why a prompt was a miss, or how much of it can be loaded.

It hashes the prompt as vLLM does, for each namespace by that namespace's identity, and hands the
chunk keys to ``kvrail explain``, which looks for them. Output and exit code are that command's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrail._core import KvrailError, namespaces
from kvrail.vllm.prompt_keys import HashRecipe, Prompt, UnknownAdapterError, UnknownHashError

# As `kvrail` exits when it could not do its work, and argparse for wrong usage.
EXIT_FAILED = 2


class ExplainError(RuntimeError):
    """The command could not do its work; the message is for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = _parser().parse_args(arguments)
    # vLLM logs to standard output by default, which belongs to the answer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        prompt = Prompt(_tokens(options), options.cache_salt, options.lora)
        keys = json.dumps(prompt_file(options.directory, prompt), indent=2)
        if options.keys_only:
            print(keys)
            return 0
        command = [find_command(), "explain", str(options.directory), "--prompt", "-"]
        command += ["--namespace", options.namespace] if options.namespace else []
        command += ["--quick"] if options.quick else []
        command += ["--json"] if options.json else []
        return subprocess.run(command, input=keys, text=True, check=False).returncode
    except (ExplainError, KvrailError, UnknownAdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def prompt_file(directory: Path, prompt: Prompt) -> dict[str, Any]:
    """The prompt's keys in each namespace of the directory, as ``kvrail explain --prompt`` reads.

    Namespaces that do not say how they hash are left out with a warning.
    """
    found: dict[str, Any] = {}
    hashed: dict[HashRecipe, list[str]] = {}
    for name, manifest, problem in namespaces(directory):
        try:
            if manifest is None:
                raise UnknownHashError(problem)
            recipe = HashRecipe.of_manifest(manifest)
            if recipe not in hashed:
                hashed[recipe] = [key.hex() for key in recipe.keys(prompt)]
        except UnknownHashError as error:
            print(f"warning: {name}: {error}", file=sys.stderr)
            continue
        found[name] = {"chunk_tokens": recipe.geometry.chunk_size, "keys": hashed[recipe]}
    if not found:
        raise ExplainError(f"no namespace of vLLM in {directory}; give the directory of `gds_path`")
    if not any(hashed.values()):
        smallest = min(recipe.geometry.chunk_size for recipe in hashed)
        raise ExplainError(
            f"a prompt of {len(prompt.tokens)} tokens has no chunk to load: the first is "
            f"{smallest} tokens, and the prompt's last token is computed in any case"
        )
    return {"prompt_tokens": len(prompt.tokens), "namespaces": found}


def find_command() -> str:
    """The command ``kvrail``: the one that was installed with this package, else on ``PATH``."""
    installed = Path(sysconfig.get_path("scripts")) / "kvrail"
    found = str(installed) if installed.is_file() else shutil.which("kvrail")
    if found is None:
        raise ExplainError(f"the command kvrail is neither {installed} nor on PATH")
    return found


def parse_tokens(text: str) -> list[int]:
    """Token ids: numbers with commas or spaces, a JSON list, or the answer of vLLM's /tokenize."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text.replace(",", " ").split()
    if isinstance(found, dict):
        found = found.get("tokens", found.get("prompt_token_ids"))
    if isinstance(found, int):
        found = [found]
    try:
        if not isinstance(found, list) or any(isinstance(token, float) for token in found):
            raise ValueError("neither numbers nor a JSON list of them")
        tokens = [int(token) for token in found]
        if not tokens or min(tokens) < 0:
            raise ValueError("no token ids")
    except (TypeError, ValueError) as error:
        raise ExplainError(f"expected token ids ({error})") from error
    return tokens


def _tokens(options: argparse.Namespace) -> list[int]:
    if options.tokens is not None:
        return parse_tokens(options.tokens)
    if options.tokens_file is not None:
        return parse_tokens(_read(options.tokens_file))
    text = options.text if options.text is not None else _read(options.text_file)
    if options.model is None:
        raise ExplainError("a text needs --model, whose tokenizer makes tokens of it")
    from vllm.tokenizers import get_tokenizer

    try:
        tokenizer = get_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        # The loaders raise errors of many kinds here; to the user all say that there is none.
        raise ExplainError(f"no tokenizer of {options.model}: {error}") from error
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=True)
    return tokens


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExplainError(f"{path}: {error}") from error


def _adapter(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError("expected NAME=PATH, as for vLLM's --lora-modules")
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvrail-explain",
        description="Say why a prompt was a miss: for each of its chunks whether it is there, was "
        "evicted, set aside, never stored, or stored in another namespace.",
        epilog="Exit codes: 0 explained; 1 a chunk is damaged; 2 wrong usage, or it could not be "
        "done (`error: ...` on stderr says why).",
    )
    parser.add_argument("directory", type=Path, help="the store: the directory of `gds_path`")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", metavar="IDS", help="the prompt's token ids: 1,2,3")
    prompt.add_argument(
        "--tokens-file",
        metavar="FILE",
        help="a file of token ids, or with the answer of vLLM's /tokenize, which takes messages "
        "of a chat as well; - is standard input",
    )
    prompt.add_argument("--text", help="the prompt as the server completes it")
    prompt.add_argument("--text-file", metavar="FILE", help="a file with it; - is standard input")
    parser.add_argument("--model", help="name or path of the model whose tokenizer a text needs")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="as vLLM's option, for the tokenizer"
    )
    parser.add_argument("--cache-salt", metavar="SALT", help="the request's cache_salt")
    parser.add_argument(
        "--lora",
        metavar="NAME=PATH",
        type=_adapter,
        help="the request's adapter, as the server was given it",
    )
    parser.add_argument(
        "--namespace",
        metavar="NAME",
        help="the namespace that the instance uses, as its log says at start [default: each that "
        "knows something of the prompt]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="look whether chunks are there, and read none of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--keys-only",
        action="store_true",
        help="print the chunk keys, for `kvrail explain --prompt` elsewhere",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
