"""Measures what kvrail costs a vLLM whose prompts never hit.

Each run is a process of its own that answers the same number of random prompts, all distinct, with
an empty store, so that every lookup is a miss and every chunk is stored. Three kinds of runs take
turns: without a connector, with one that does nothing (what vLLM itself does differently as soon as
there is any connector), and with kvrail. The medians of the rounds' ratios are the result.
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
KINDS = ("without", "idle", "kvrail")
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

    connectors = {
        "without": None,
        "idle": {
            "kv_connector": "IdleConnector",
            "kv_connector_module_path": "idle_connector",
            "kv_role": "kv_both",
        },
        "kvrail": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
    }
    engine = LLM(
        str(arguments.model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=8192,
        kv_transfer_config=connectors[arguments.child],
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
    # A process that is killed leaves its sockets behind. Their paths must be short.
    sockets = tempfile.TemporaryDirectory(prefix="kvrail-")
    try:
        (folder / "gds-backend.yaml").write_text(
            "local_cpu: false\nchunk_size: 256\n"
            f'gds_path: "{folder / "store"}"\ncufile_buffer_size: 256\n'
        )
        environment = clean_environment(
            {
                "LMCACHE_CONFIG_FILE": str(folder / "gds-backend.yaml"),
                "LMCACHE_USE_EXPERIMENTAL": "True",
                "VLLM_RPC_BASE_PATH": sockets.name,
            }
        )
        if arguments.reserved_cores is not None:
            environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = str(arguments.reserved_cores)
        if kind != "kvrail":
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
        sockets.cleanup()
    if (kind == "kvrail") != (chunks > 0):
        raise RuntimeError(f"the run of kind {kind!r} left {chunks} chunk files")
    return seconds


def result_seconds(child: subprocess.CompletedProcess[str]) -> float:
    """Finds the child's result in its output."""
    for line in reversed(child.stdout.splitlines()):
        if line.startswith('{"seconds"'):
            return float(json.loads(line)["seconds"])
    output = (child.stdout + child.stderr).splitlines()[-LOG_TAIL_LINES:]
    raise RuntimeError("\n".join([f"the run ended with {child.returncode}:", *output]))


def run_rounds(arguments: argparse.Namespace) -> None:
    """Runs the rounds and prints each, then the medians."""
    tokens = arguments.prompts * PROMPT_TOKENS
    print(
        f"{arguments.prompts} prompts of {PROMPT_TOKENS} tokens, {ANSWER_TOKENS} tokens of answer; "
        f"{arguments.rounds} rounds",
        flush=True,
    )
    results: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        # Which comes first changes, so that a machine that slows down favours none.
        first = number % len(KINDS)
        for kind in KINDS[first:] + KINDS[:first]:
            started = time.monotonic()
            results[kind].append(measure(arguments, number, kind))
            print(
                f"  round {number + 1}: {kind:>7} {results[kind][-1]:7.2f} s "
                f"({time.monotonic() - started:.0f} s with the start of vLLM)",
                flush=True,
            )
    for kind, seconds in results.items():
        middle = statistics.median(seconds)
        print(
            f"{kind:>7}: median {middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{tokens / middle:.0f} prompt tokens/s"
        )
    for above, below in (("kvrail", "without"), ("idle", "without"), ("kvrail", "idle")):
        ratios = [a / b for a, b in zip(results[above], results[below], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{above} / {below}: median {statistics.median(ratios):.3f} of {shown}")


def main() -> int:
    """Runs the benchmark, or one run of it as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of three runs")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of one run")
    # With any connector vLLM sets one more core aside, which on a machine of two cores makes it set
    # aside none and compute on twice as many. All kinds get the same.
    parser.add_argument(
        "--reserved-cores",
        type=lambda text: None if text == "default" else int(text),
        default=1,
        help="VLLM_CPU_NUM_OF_RESERVED_CPU, or `default` for what vLLM does without it",
    )
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Unwinding on SIGTERM removes the folder of the run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache_folder().mkdir(parents=True, exist_ok=True)
    arguments.model = arguments.model or make_model(cache_folder().absolute())
    if arguments.child:
        run_child(arguments)
    else:
        run_rounds(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
