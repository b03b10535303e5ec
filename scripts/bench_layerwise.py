"""Measures whether a layer-wise load would beat the asynchronous one.

kvrail loads asynchronously: vLLM runs other requests until all blocks of a request are there. With
a layer-wise load the request's forward starts at once and waits at each layer for that layer's
bytes; since a forward is that of the whole batch, all requests in it wait as well. This is tried
with a real vLLM, a model with 64 KiB of KV per token, and loads through kvrail's own store, in one
engine, the ways of loading in turn (`steered_connector.py`):

asynchronous   what kvrail does
layer-wise     each layer from files of its own, the first layers' first; the forward waits by layer
synchronous    as asynchronous, but the forward waits for all: what is lost by waiting inside
async layers   asynchronous from the layers' files: what the other files alone make out

Two things are measured: the first token of one request, with more or less to compute beside the
load, and the pauses between the tokens of two requests that decode while a third one loads.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_ttft import RUN_LIMIT_SECONDS, Asking, spread, wait_for_files
from engine_run import print_result, random_tokens, run_apart, scratch_folder
from make_model import cache_folder
from make_wide_model import KV_BYTES_PER_TOKEN, LAYERS, VOCABULARY, make_wide_model

CHUNK_SIZE = 256
# Source and wait of `steered_connector.Steer`.
WAYS = {
    "asynchronous": ("chunks", "step"),
    "layer-wise": ("layers", "layer"),
    "synchronous": ("chunks", "all"),
    "async layers": ("layers", "step"),
}
RUNNING = 2
# Tokens that the running requests decode before the third one comes, and after its first.
BEFORE, AFTER = 20, 5
STEP_LIMIT = 20000


def first_token(asking: Asking, prompt: list[int], way: str) -> dict[str, Any]:
    """One request alone, with nothing of it in vLLM."""
    from bare_reader import drop_from_page_cache

    drop_from_page_cache(asking.files)
    asking.forget()
    asking.steer.source, asking.steer.wait = WAYS[way]
    return asking.ask(prompt)


def pauses(
    asking: Asking, running: list[list[int]], prompt: list[int] | None, way: str
) -> dict[str, Any]:
    """Milliseconds between tokens of requests that decode while another one loads, or none does."""
    from vllm import SamplingParams

    from bare_reader import drop_from_page_cache

    drop_from_page_cache(asking.files)
    asking.forget()
    asking.steer.source, asking.steer.wait = WAYS[way]
    engine = asking.engine.llm_engine
    endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True, detokenize=False)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    names = [f"running-{index}" for index in range(len(running))]
    for name, tokens in zip(names, running, strict=True):
        engine.add_request(name, {"prompt_token_ids": tokens}, endless)
    seen: dict[str, int] = {}
    times: list[float] = []
    asked = answered = None
    left = AFTER
    for _ in range(STEP_LIMIT):
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == "loading":
                answered = now
            else:
                seen[output.request_id] = len(output.outputs[0].token_ids)
        if any(output.request_id == names[0] for output in outputs):
            times.append(now)
        ready = len(seen) == len(names) and min(seen.values()) >= BEFORE
        if ready and asked is None:
            times = [now]
            asked = time.perf_counter()
            if prompt is not None:
                engine.add_request("loading", {"prompt_token_ids": prompt}, one)
        # Without a load as many steps as a load spans are about what is compared.
        done = answered is not None if prompt is not None else len(times) > 5 * BEFORE
        if done:
            left -= 1
            if left == 0:
                break
    else:
        raise RuntimeError(f"no answer within {STEP_LIMIT} steps")
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    assert asked is not None
    return {
        "pauses": [1e3 * (after - before) for before, after in pairwise(times)],
        "seconds": None if answered is None else answered - asked,
    }


def run_child(arguments: argparse.Namespace) -> None:
    """Stores the prefix, runs the rounds."""
    from steered_connector import steer

    steer.layer_files = True
    asking = Asking(arguments)
    source = random.Random(2)
    prefix = random_tokens(source, arguments.prefix_tokens, VOCABULARY)
    asking.ask([*prefix, 200])
    chunks = arguments.prefix_tokens // CHUNK_SIZE
    files = wait_for_files(arguments.store, chunks * (1 + LAYERS))
    asking.files = files
    ways = list(WAYS)
    rounds = []
    for number in range(arguments.rounds + 1):
        order = ways[number % len(ways) :] + ways[: number % len(ways)]
        result: dict[str, Any] = {"alone": {}, "beside": {}}
        for suffix in arguments.suffix:
            # Tokens after the prefix that nobody has; the same for all ways.
            prompt = prefix + random_tokens(source, suffix, VOCABULARY)
            found = {way: first_token(asking, prompt, way) for way in order}
            # The last way left everything in vLLM's cache but the token that is always computed.
            found["local"] = local(asking, prompt)
            result["alone"][str(suffix)] = found
        prompt = prefix + random_tokens(source, arguments.suffix[0], VOCABULARY)
        running = [random_tokens(source, 100, VOCABULARY) for _ in range(RUNNING)]
        for way in order:
            result["beside"][way] = pauses(asking, running, prompt, way)
        result["beside"]["no load"] = pauses(asking, running, None, "asynchronous")
        # The first round touches memory that was never used.
        if number > 0:
            rounds.append(result)
    sizes = sorted({file.stat().st_size for file in files})
    print_result({"rounds": rounds, "sizes": sizes, "files": len(files)})
    asking.engine.llm_engine.engine_core.shutdown()


def local(asking: Asking, prompt: list[int]) -> dict[str, Any]:
    """The same prompt with its prefix in vLLM's own cache, and the suffix to compute."""
    changed = [*prompt[: len(prompt) // CHUNK_SIZE * CHUNK_SIZE]]
    changed += [(token + 1) % VOCABULARY for token in prompt[len(changed) :]]
    return asking.ask(changed)


def check(rounds: Sequence[dict[str, Any]], prefix_tokens: int) -> None:
    """All ways must have loaded the whole prefix, and give the same token."""
    for found in rounds:
        for suffix, answers in found["alone"].items():
            tokens = {answers[way]["token"] for way in WAYS}
            cached = {answers[way]["cached"] for way in (*WAYS, "local")}
            if len(tokens) != 1 or cached != {prefix_tokens}:
                raise RuntimeError(f"suffix {suffix}: tokens {tokens}, loaded {cached}")


def report(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the figures."""
    rounds = result["rounds"]
    check(rounds, arguments.prefix_tokens)
    sizes = " and ".join(f"{size / 2**20:.2f} MiB" for size in result["sizes"])
    print(
        f"{arguments.prefix_tokens} tokens loaded, "
        f"{arguments.prefix_tokens * KV_BYTES_PER_TOKEN / 1e9:.3f} GB of KV in {LAYERS} layers, "
        f"files of {sizes}; {len(rounds)} rounds, median (lowest-highest)"
    )
    for suffix in map(str, arguments.suffix):
        print(f"\none request, {suffix} tokens to compute: first token, s")
        base = [found["alone"][suffix]["asynchronous"]["seconds"] for found in rounds]
        for way in (*WAYS, "local"):
            seconds = [found["alone"][suffix][way]["seconds"] for found in rounds]
            ratios = [ours / theirs for ours, theirs in zip(seconds, base, strict=True)]
            print(f"  {way:13} {spread(seconds)}  against asynchronous {spread(ratios, 2)}")
    print(f"\n{RUNNING} requests decode, a third loads ({arguments.suffix[0]} to compute):")
    for way in (*WAYS, "no load"):
        found = [one["beside"][way] for one in rounds]
        every = [pause for one in found for pause in one["pauses"]]
        parts = statistics.quantiles(every, n=100, method="inclusive")
        longest = [max(one["pauses"]) for one in found]
        line = (
            f"  {way:13} pauses between tokens, ms: median {statistics.median(every):.1f}, "
            f"p99 {parts[98]:.1f}, longest of a round {spread(longest, 1)}"
        )
        if way != "no load":
            line += f"; first token {spread([one['seconds'] for one in found])} s"
        print(line)


def main() -> int:
    """Runs the experiment, or its vLLM as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix-tokens", type=int, default=8192)
    parser.add_argument(
        "--suffix", type=int, nargs="+", default=[1, 16, 64], help="tokens to compute"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="I/O threads")
    # Each layer's memory would be registered with io_uring, which is not what is measured.
    parser.add_argument("--engine", default="posix", help="extra_config.io_engine")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Unwinding on SIGTERM removes the folder of the run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.prefix_tokens % CHUNK_SIZE or max(arguments.suffix) >= CHUNK_SIZE:
        parser.error("the prefix is whole chunks, and what is computed is less than one")
    arguments.prompt_tokens = arguments.prefix_tokens + max(arguments.suffix)
    if arguments.child:
        run_child(arguments)
        return 0
    model = make_wide_model(cache_folder().absolute())
    with scratch_folder("layerwise-") as folder:
        command = ["--child", "--model", str(model), "--store", str(folder / "store")]
        for name in ("prefix_tokens", "rounds", "threads", "engine"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        command += ["--suffix", *map(str, arguments.suffix)]
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            # Two threads that compute wait for each other whenever an I/O thread takes a core.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            "VLLM_PLUGINS": "",
        }
        result = run_apart(__file__, command, environment, RUN_LIMIT_SECONDS)
    report(result, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
