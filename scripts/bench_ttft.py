"""Measures the time to first token of a prompt whose KV comes from files, against bare reads.

A real vLLM in a process of its own serves a model with 64 KiB of KV per token and next to no
computing (`make_wide_model.py`). The prompt is computed and stored once. Then rounds: vLLM forgets
what it has (`reset_prefix_cache`) and is asked again, with the files on the disk and with the files
in the page cache; each beside the time in which as many threads read the same files bare and the
bytes are copied once. What vLLM itself takes is measured twice: with all in its own prefix cache,
and with a load that ends at once (`steered_connector.py`).
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_run import chunk_files, print_result, random_tokens, run_apart, scratch_folder
from make_model import cache_folder
from make_wide_model import KV_BYTES_PER_TOKEN, VOCABULARY, make_wide_model

CHUNK_SIZE = 256
STORE_LIMIT_SECONDS = 120.0
RUN_LIMIT_SECONDS = 1800.0
TARGET = 1.5


def wait_for_files(store: Path, count: int) -> list[Path]:
    """Waits for `count` chunk files. Raises RuntimeError when they do not come."""
    deadline = time.monotonic() + STORE_LIMIT_SECONDS
    while len(files := chunk_files(store)) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(files)} of {count} chunk files came: were stores dropped?")
        time.sleep(0.1)
    return files


class Asking:
    """A vLLM that is asked for one token."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        from steered_connector import steer

        self.steer = steer
        self.files: list[Path] = []
        self.engine = LLM(
            str(arguments.model),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=arguments.prompt_tokens + 64,
            max_num_batched_tokens=1024,
            enable_prefix_caching=True,
            disable_log_stats=False,
            kv_transfer_config={
                "kv_connector": "SteeredConnector",
                "kv_connector_module_path": "steered_connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "gds_path": str(arguments.store),
                    "chunk_size": CHUNK_SIZE,
                    "cufile_buffer_size": 256,
                    "min_load_tokens": 0,
                    "extra_config": {
                        "disk_io_threads": arguments.threads,
                        "io_engine": arguments.engine,
                    },
                },
            },
        )
        self._sampling = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False
        )

    def forget(self) -> None:
        """Empties vLLM's own prefix cache."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """One token: when it came, what it was, how many tokens were not computed."""
        start = time.perf_counter()
        output = self.engine.generate({"prompt_token_ids": prompt}, self._sampling, use_tqdm=False)[
            0
        ]
        return {
            "seconds": time.perf_counter() - start,
            "token": output.outputs[0].token_ids[0],
            "cached": output.num_cached_tokens,
            "before_load": self.steer.submitted - start,
            "load": self.steer.settled - self.steer.submitted,
        }

    def counters(self) -> dict[str, float]:
        """The counters of kvrail."""
        from prometheus_client import REGISTRY

        samples = (sample for family in REGISTRY.collect() for sample in family.samples)
        return {
            sample.name.removeprefix("kvrail:").removesuffix("_total"): sample.value
            for sample in samples
            if sample.name.startswith("kvrail:") and not sample.name.endswith("_created")
        }


def run_child(arguments: argparse.Namespace) -> None:
    """Stores the prompt, runs the rounds."""
    from bare_reader import BareReader, drop_from_page_cache

    asking = Asking(arguments)
    source = random.Random(1)
    asking.ask(random_tokens(source, CHUNK_SIZE // 2, VOCABULARY))
    prompt = random_tokens(source, arguments.prompt_tokens, VOCABULARY)
    computed = asking.ask(prompt)
    files = wait_for_files(arguments.store, (arguments.prompt_tokens - 1) // CHUNK_SIZE)
    reader = BareReader(files, arguments.threads)

    def loaded(source: str) -> dict[str, Any]:
        asking.forget()
        asking.steer.source = source
        return asking.ask(prompt)

    def bare(direct: bool) -> dict[str, float]:
        return {
            "read": reader.read(direct=direct),
            "copy": reader.copy(),
            "both": reader.read_and_copy(direct=direct),
        }

    def disk() -> dict[str, Any]:
        drop_from_page_cache(files)
        found = {"kvrail": loaded("chunks")}
        found["local"] = asking.ask(prompt)
        found["nothing"] = loaded("nothing")
        drop_from_page_cache(files)
        return found | {"bare": bare(True)}

    def memory() -> dict[str, Any]:
        reader.read(direct=False)
        reader.read(direct=False)
        found = {"kvrail": loaded("chunks")}
        return found | {"bare": bare(False)}

    rounds = []
    for number in range(arguments.rounds + 1):
        steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [("disk", disk), ("cache", memory)]
        result = {name: step() for name, step in (steps if number % 2 == 0 else reversed(steps))}
        # The first round touches memory that was never used, on both sides.
        if number > 0:
            rounds.append(result)
    print_result(
        {
            "computed": computed,
            "rounds": rounds,
            "counters": asking.counters(),
            "files": len(files),
            "bytes": reader.bytes,
        }
    )
    asking.engine.llm_engine.engine_core.shutdown()


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The median, and the lowest and the highest."""
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low}-{high})"


def report(result: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Prints the figures; tells whether the target is met from the disk."""
    rounds, first = result["rounds"], result["computed"]
    loaded = (arguments.prompt_tokens - 1) // CHUNK_SIZE * CHUNK_SIZE
    answers = [part["kvrail"] for found in rounds for part in found.values()]
    for answer in answers + [found["disk"]["local"] for found in rounds]:
        if answer["token"] != first["token"]:
            raise RuntimeError(f"token {answer['token']} instead of {first['token']}: wrong KV")
    if any(answer["cached"] != loaded for answer in answers):
        raise RuntimeError(f"{[answer['cached'] for answer in answers]} tokens loaded of {loaded}")
    gigabytes = loaded * KV_BYTES_PER_TOKEN / 1e9
    print(
        f"{arguments.prompt_tokens} tokens, {loaded} of them ({gigabytes:.3f} GB of KV) in "
        f"{result['files']} files of {result['bytes'] / result['files'] / 2**20:.1f} MiB; computed "
        f"and stored in {first['seconds']:.1f} s; {len(rounds)} rounds, median (lowest-highest), s"
    )
    counters = result["counters"]
    cached = counters.get("page_cache_bytes_loaded", 0.0)
    print(
        f"kvrail loaded {counters['bytes_loaded'] / 1e9:.3f} GB in {counters['chunks_loaded']:.0f} "
        f"chunks, {cached / 1e9:.3f} GB of it from the page cache, the round before the first too"
    )
    local = [found["disk"]["local"]["seconds"] for found in rounds]
    nothing = [found["disk"]["nothing"]["seconds"] for found in rounds]
    print(f"all in vLLM's own prefix cache: {spread(local)}")
    print(f"a load that ends at once:       {spread(nothing)}")
    met = False
    for part, name in (("disk", "files on the disk"), ("cache", "files in the page cache")):
        asked = [found[part]["kvrail"] for found in rounds]
        bare = [found[part]["bare"] for found in rounds]
        seconds = [answer["seconds"] for answer in asked]
        apart = [one["read"] + one["copy"] for one in bare]
        together = [one["both"] for one in bare]
        print(f"{name}:")
        print(f"  first token                   {spread(seconds)}")
        print(f"    until the load is submitted {spread([one['before_load'] for one in asked])}")
        print(f"    load                        {spread([one['load'] for one in asked])}")
        rest = [one["seconds"] - one["before_load"] - one["load"] for one in asked]
        print(f"    the rest                    {spread(rest)}")
        print(f"  bare: read                    {spread([one['read'] for one in bare])}")
        print(f"    copy                        {spread([one['copy'] for one in bare])}")
        print(f"    read, and copied meanwhile  {spread(together)}")
        for label, below in (("read + copy", apart), ("read, copied meanwhile", together)):
            ratios = [a / b for a, b in zip(seconds, below, strict=True)]
            own = [
                (answer["seconds"] - floor) / b
                for answer, floor, b in zip(asked, nothing, below, strict=True)
            ]
            print(f"  against {label}: {spread(ratios, 2)}; less vLLM's own: {spread(own, 2)}")
            if part == "disk" and label == "read + copy":
                met = statistics.median(ratios) <= TARGET
    return met


def main() -> int:
    """Runs the benchmark, or its vLLM as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # 32 chunks of 256 tokens, and the one token that is always computed.
    parser.add_argument("--prompt-tokens", type=int, default=8193)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4, help="I/O threads, of the bare side too")
    parser.add_argument("--engine", default="auto", help="extra_config.io_engine")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Unwinding on SIGTERM removes the folder of the run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.child:
        run_child(arguments)
        return 0
    model = make_wide_model(cache_folder().absolute())
    with scratch_folder("ttft-") as folder:
        command = ["--child", "--model", str(model), "--store", str(folder / "store")]
        for name in ("prompt_tokens", "rounds", "threads", "engine"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            # Two threads that compute wait for each other whenever an I/O thread takes a core.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            "VLLM_PLUGINS": "",
        }
        result = run_apart(__file__, command, environment, RUN_LIMIT_SECONDS)
    met = report(result, arguments)
    print(f"at most {TARGET} times bare, files on the disk: {'yes' if met else 'NO'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
