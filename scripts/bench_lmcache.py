"""Measures vLLM with kvrail, and with LMCache's server over its adapters and over kvrail's.

Four sides, each a vLLM of its own with a model of 64 KiB of KV per token and little computing
(`make_wide_model.py`): kvrail's connector; LMCache's connector and server with the L2 adapters
`fs`, `fs_native` and kvrail's. Rounds in turn. In each, prompts of several lengths are computed and
stored (cold), then L1 is emptied, the files leave the page cache, and they are asked again (warm).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine_run import print_result, random_tokens, run_apart, scratch_folder, spread
from make_model import cache_folder
from make_wide_model import KV_BYTES_PER_TOKEN, VOCABULARY, make_wide_model

CHUNK_SIZE = 256
LENGTHS = (1025, 2049, 4097, 8193)
"""Whole chunks, and the one token that is always computed."""
SIDES = ("kvrail", "lmcache fs", "lmcache fs_native", "lmcache kvrail")
THREADS = 4
STORE_LIMIT_SECONDS = 60.0
RUN_LIMIT_SECONDS = 400.0
L1_GB = 2.0
LOG_CHARACTERS = 4000


def l2_adapter(side: str, store: Path) -> dict[str, Any]:
    """The value of `--l2-adapter` for a side."""
    from lmcache_server import kvrail_adapter

    if side == "lmcache fs":
        return {"type": "fs", "base_path": str(store)}
    if side == "lmcache fs_native":
        return {"type": "fs_native", "base_path": str(store), "num_workers": THREADS}
    return kvrail_adapter(store, extra_config={"disk_io_threads": THREADS})


def files_in(store: Path) -> list[Path]:
    """The files with chunks, kvrail's or LMCache's."""
    return sorted([*store.glob("**/*.safetensors"), *store.glob("*.data")])


def wait_for_bytes(store: Path, expected: int) -> list[Path]:
    """Waits until the files hold `expected` bytes of KV. Raises RuntimeError when they do not."""
    deadline = time.monotonic() + STORE_LIMIT_SECONDS
    while True:
        files = files_in(store)
        with contextlib.suppress(FileNotFoundError):
            if sum(path.stat().st_size for path in files) >= expected:
                return files
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(files)} files hold less than {expected} bytes of KV")
        time.sleep(0.05)


def connector(side: str, store: Path, port: int | None) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` of a side."""
    if side == "kvrail":
        settings: dict[str, Any] = {
            "gds_path": str(store),
            "chunk_size": CHUNK_SIZE,
            "min_load_tokens": 0,
            "extra_config": {"disk_io_threads": THREADS},
        }
        return {
            "kv_connector": "KvrailConnector",
            "kv_connector_module_path": "kvrail.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
        },
    }


def cpu_seconds(server: int | None) -> float:
    """The CPU seconds of this process, its children and the server."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    if server is not None:
        processes += [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    used = 0.0
    for process in {process.pid: process for process in processes}.values():
        times = process.cpu_times()
        used += times.user + times.system
    return used


def run_child(arguments: argparse.Namespace) -> None:
    """One side, one round: every length cold, then every length warm."""
    from bare_reader import drop_from_page_cache
    from lmcache_server import serve

    with contextlib.ExitStack() as stack:
        server = None
        if arguments.side != "kvrail":
            adapter = l2_adapter(arguments.side, arguments.store)
            log = arguments.store.with_suffix(".log")
            server = stack.enter_context(serve(adapter, log, os.environ, L1_GB))
        try:
            print_result(measure(arguments, server, drop_from_page_cache))
        except Exception:
            if server is not None:
                print(server.log.read_text()[-LOG_CHARACTERS:])
            raise


def measure(arguments: argparse.Namespace, server: Any, drop: Any) -> list[dict[str, Any]]:
    """The figures of a side, one for each length."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(arguments.model),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(LENGTHS) + 64,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        kv_transfer_config=connector(
            arguments.side, arguments.store, server.port if server else None
        ),
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    process = server.process.pid if server else None

    def ask(prompt: list[int]) -> dict[str, Any]:
        used, start = cpu_seconds(process), time.perf_counter()
        (output,) = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "cpu": cpu_seconds(process) - used,
            "token": output.outputs[0].token_ids[0],
            "cached": output.num_cached_tokens,
        }

    source = random.Random(1)
    ask(random_tokens(source, CHUNK_SIZE // 2, VOCABULARY))
    # One that is loaded and not counted: the first load of a process finds much for the first time.
    prompts = [random_tokens(source, length, VOCABULARY) for length in (1025, *LENGTHS)]
    stored, cold = 0, []
    for prompt in prompts:
        cold.append(ask(prompt))
        stored += (len(prompt) - 1) * KV_BYTES_PER_TOKEN
        files = wait_for_bytes(arguments.store, stored)
    # What was written last may not be on the disk yet, and is not dropped then.
    os.sync()
    figures = []
    for prompt, first in zip(prompts, cold, strict=True):
        if server is not None:
            server.forget()
        drop(files)
        warm = ask(prompt)
        if warm["token"] != first["token"]:
            raise RuntimeError(f"token {warm['token']} instead of {first['token']}: wrong KV")
        if warm["cached"] != len(prompt) - 1:
            raise RuntimeError(f"{warm['cached']} tokens of {len(prompt) - 1} were loaded")
        figures.append({"tokens": len(prompt), "cold": first, "warm": warm})
    return figures[1:]


def report(rounds: list[dict[str, list[dict[str, Any]]]]) -> None:
    """Prints the table."""
    print("| tokens | side | cold, s | warm, s | GB/s, warm | CPU s, cold | CPU s, warm |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for index, tokens in enumerate(LENGTHS):
        for side in SIDES:
            found = [figures[side][index] for figures in rounds]
            size = (tokens - 1) * KV_BYTES_PER_TOKEN / 1e9
            cold = [one["cold"]["seconds"] for one in found]
            warm = [one["warm"]["seconds"] for one in found]
            cells = [
                str(tokens),
                side,
                spread(cold),
                spread(warm, 3),
                spread([size / seconds for seconds in warm]),
                spread([one["cold"]["cpu"] for one in found]),
                spread([one["warm"]["cpu"] for one in found]),
            ]
            print(f"| {' | '.join(cells)} |")


def main() -> int:
    """Runs the benchmark, or one side of it as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.side:
        run_child(arguments)
        return 0
    model = make_wide_model(cache_folder().absolute())
    here = Path(__file__).resolve().parent
    lmcache = subprocess.run(
        [here / "lmcache_environment"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # As in the other benchmarks: threads that compute must not wait for those that do I/O.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "VLLM_PLUGINS": "",
        "LMCACHE_TRACK_USAGE": "false",
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], lmcache]),
    }
    rounds = []
    with scratch_folder("lmcache-bench-") as folder:
        for number in range(arguments.rounds):
            found = {}
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                store = folder / f"{number}-{side.replace(' ', '-')}"
                command = ["--side", side, "--model", str(model), "--store", str(store)]
                found[side] = run_apart(__file__, command, environment, RUN_LIMIT_SECONDS)
                last = found[side][-1]
                print(
                    f"round {number + 1}, {side}: {last['tokens']} tokens cold in "
                    f"{last['cold']['seconds']:.2f} s, warm in {last['warm']['seconds']:.3f} s",
                    flush=True,
                )
                for path in files_in(store):
                    path.unlink()
            rounds.append(found)
    report(rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
