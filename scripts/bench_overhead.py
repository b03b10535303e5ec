"""Measures what kvrail costs a vLLM whose prompts never hit.

Each run is a process of its own that answers the same number of random prompts, all distinct, with
an empty store, so that every lookup is a miss and every chunk is stored. Runs without and with
kvrail alternate; the median of the pairs' ratios is the result.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_model import cache_folder, make_model
from vllm_server import clean_environment

PROMPT_TOKENS = 2000
ANSWER_TOKENS = 16
RUN_LIMIT_SECONDS = 900.0
LOG_TAIL_LINES = 40


def random_prompts(seed: int, count: int, vocabulary_size: int) -> list[dict[str, list[int]]]:
    """Draws `count` prompts of random tokens; two seeds have no prompt in common."""
    source = random.Random(seed)
    # The first tokens of the vocabulary are the special ones.
    return [
        {
            "prompt_token_ids": [
                source.randrange(100, vocabulary_size - 100) for _ in range(PROMPT_TOKENS)
            ]
        }
        for _ in range(count)
    ]


def run_child(arguments: argparse.Namespace) -> None:
    """Answers the prompts in this process and prints the seconds that took as JSON."""
    from vllm import LLM, SamplingParams

    connector = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    engine = LLM(
        str(arguments.model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=8192,
        kv_transfer_config=connector if arguments.child == "with" else None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    vocabulary_size = engine.get_tokenizer().vocab_size
    # The first pass through a new process is slower than all later ones.
    warm_up = random_prompts(-1 - arguments.seed, 1, vocabulary_size)
    engine.generate(warm_up, sampling, use_tqdm=False)
    prompts = random_prompts(arguments.seed, arguments.prompts, vocabulary_size)
    start = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def measure(arguments: argparse.Namespace, seed: int, kind: str) -> float:
    """Runs one child and returns its seconds; its store is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="overhead-", dir=cache_folder()))
    try:
        (folder / "gds-backend.yaml").write_text(
            "local_cpu: false\nchunk_size: 256\n"
            f'gds_path: "{folder / "store"}"\ncufile_buffer_size: 256\n'
        )
        environment = clean_environment(
            {
                "LMCACHE_CONFIG_FILE": str(folder / "gds-backend.yaml"),
                "LMCACHE_USE_EXPERIMENTAL": "True",
                # With any connector vLLM sets one more core aside, which on a machine of two cores
                # makes it set aside none and compute on twice as many. Both runs get the same.
                "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            }
        )
        if kind == "without":
            # Not even the plugin that registers the connector is loaded.
            environment["VLLM_PLUGINS"] = ""
        command = [sys.executable, __file__, "--child", kind, "--seed", str(seed)]
        command += ["--prompts", str(arguments.prompts), "--model", str(arguments.model)]
        child = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_SECONDS,
            check=False,
        )
        chunks = sum(1 for _ in (folder / "store").rglob("*.safetensors"))
        seconds = result_seconds(child)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if (kind == "with") != (chunks > 0):
        raise RuntimeError(f"the run {kind} kvrail left {chunks} chunk files")
    return seconds


def result_seconds(child: subprocess.CompletedProcess[str]) -> float:
    """Finds the child's result in its output."""
    for line in reversed(child.stdout.splitlines()):
        if line.startswith('{"seconds"'):
            return float(json.loads(line)["seconds"])
    output = (child.stdout + child.stderr).splitlines()[-LOG_TAIL_LINES:]
    raise RuntimeError("\n".join([f"the run ended with {child.returncode}:", *output]))


def run_pairs(arguments: argparse.Namespace) -> None:
    """Runs the pairs and prints each, then the medians."""
    tokens = arguments.prompts * PROMPT_TOKENS
    print(
        f"{arguments.prompts} prompts of {PROMPT_TOKENS} tokens, {ANSWER_TOKENS} tokens of answer; "
        f"{arguments.pairs} pairs",
        flush=True,
    )
    results: dict[str, list[float]] = {"without": [], "with": []}
    for pair in range(arguments.pairs):
        # Which comes first alternates, so that a machine that slows down favours neither.
        order = ("without", "with") if pair % 2 == 0 else ("with", "without")
        for kind in order:
            started = time.monotonic()
            results[kind].append(measure(arguments, pair, kind))
            print(
                f"  pair {pair + 1}: {kind:>7} kvrail {results[kind][-1]:7.2f} s "
                f"({time.monotonic() - started:.0f} s with the start of vLLM)",
                flush=True,
            )
    pairs = zip(results["with"], results["without"], strict=True)
    ratios = sorted(with_kvrail / without for with_kvrail, without in pairs)
    for kind, seconds in results.items():
        middle = statistics.median(seconds)
        print(
            f"{kind:>7} kvrail: median {middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{tokens / middle:.0f} prompt tokens/s"
        )
    print(f"with / without, median of the pairs: {statistics.median(ratios):.3f}")
    print(f"all pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def main() -> int:
    """Runs the benchmark, or one run of it as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of one run")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("with", "without"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Unwinding on SIGTERM removes the folder of the run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache_folder().mkdir(parents=True, exist_ok=True)
    arguments.model = arguments.model or make_model(cache_folder().absolute())
    if arguments.child:
        run_child(arguments)
    else:
        run_pairs(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
