"""Measures the L2 adapters of LMCache's server alone: `fs`, `fs_native` and kvrail's.

No vLLM and no server: objects go between an L1 slab of LMCache's own classes and files, as its
controllers hand them over. All adapters in turn in each round, in one process, on one slab. Each
stores all objects in one task (until the task is done, and until all is on the disk), and loads
them into the other half of the slab, from the disk and from the page cache; the bytes are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_lmcache import THREADS, files_in, l2_adapter
from engine_run import print_result, run_apart, scratch_folder, spread

OBJECTS = 32
OBJECT_SHAPE = (2, 32, 256, 512)
"""16 MiB of bfloat16: 256 tokens of a model with 64 KiB of KV per token."""
OBJECT_BYTES = 16 << 20
WARM_UP_ROUNDS = 6
"""Not counted: an adapter's memory is touched for the first time, kvrail's staging bit by bit."""
RUN_LIMIT_SECONDS = 540.0
SIDES = ("fs", "fs_native", "fs_native, O_DIRECT", "kvrail")
PHASES = ("store", "store and sync", "load, disk", "load, page cache")


def adapter_of(side: str, store: Path) -> dict[str, Any]:
    """The value of `--l2-adapter` for a side."""
    name, _, direct = side.partition(", ")
    adapter = l2_adapter(f"lmcache {name}", store)
    return adapter | ({"use_odirect": True} if direct else {})


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, its seconds, and the CPU seconds of this process."""
    start, used = time.perf_counter(), time.process_time()
    result = work()
    return result, {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def run_side(
    side: str, driver: Any, store: Path, number: int, l1: Any, memories: tuple[list[Any], list[Any]]
) -> dict[str, dict[str, float]]:
    """One adapter, one round: the seconds and CPU seconds of each phase."""
    from bare_reader import drop_from_page_cache
    from lmcache_slab import key

    sources, targets = memories
    keys = [key(number * len(sources) + index) for index in range(len(sources))]
    os.sync()
    stored, store_time = timed(lambda: driver.store(keys, sources))
    if not stored.is_successful():
        raise RuntimeError(f"{side}: not everything was stored")
    _, sync_time = timed(os.sync)
    found = {
        "store": store_time,
        "store and sync": {name: store_time[name] + sync_time[name] for name in store_time},
    }
    files = files_in(store)
    for phase in ("load, disk", "load, page cache"):
        if phase == "load, disk":
            drop_from_page_cache(files)
        else:
            for path in files:
                path.read_bytes()
        for target in targets:
            l1.bytes(target).fill_(0x5A)
        loaded, found[phase] = timed(lambda: driver.load(keys, targets))
        if not all(loaded):
            raise RuntimeError(f"{side}: not everything was loaded")
        for source, target in zip(sources, targets, strict=True):
            if not l1.bytes(source).equal(l1.bytes(target)):
                raise RuntimeError(f"{side}: other bytes were loaded")
    for path in files:
        path.unlink()
    return found


def run_child(rounds: int, folder: Path) -> None:
    """All rounds, in a process that can import LMCache."""
    import torch

    from lmcache_slab import L1, Driver

    shape = torch.Size(OBJECT_SHAPE)
    l1 = L1((2 * OBJECTS + 1) * OBJECT_BYTES)
    sources = [l1.random(index, shape) for index in range(OBJECTS)]
    targets = [l1.allocate(shape) for _ in range(OBJECTS)]
    drivers = {side: Driver(adapter_of(side, folder / side), l1) for side in SIDES}
    found = []
    for number in range(WARM_UP_ROUNDS + rounds):
        one = {}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            memories = (sources, targets)
            one[side] = run_side(side, drivers[side], folder / side, number, l1, memories)
        found.append(one)
    for driver in drivers.values():
        driver.adapter.close()
    print_result(found[WARM_UP_ROUNDS:])


def report(rounds: list[dict[str, Any]]) -> None:
    """Prints GB/s, the ratio to `fs_native`, and CPU seconds per GB, for each phase and side."""
    size = OBJECTS * OBJECT_BYTES / 1e9
    print("| phase | adapter | GB/s | against fs_native | CPU s/GB |")
    print("| --- | --- | --- | --- | --- |")
    for phase in PHASES:
        for side in SIDES:
            seconds = [one[side][phase]["seconds"] for one in rounds]
            ratios = [
                one["fs_native"][phase]["seconds"] / one[side][phase]["seconds"] for one in rounds
            ]
            cpu = statistics.median(one[side][phase]["cpu"] / size for one in rounds)
            speed = spread([size / one for one in seconds])
            print(f"| {phase} | {side} | {speed} | {spread(ratios)} | {cpu:.2f} |")


def main() -> int:
    """Runs the benchmark, in a child process that has LMCache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        run_child(arguments.rounds, arguments.folder)
        return 0
    here = Path(__file__).resolve().parent
    lmcache = subprocess.run(
        [here / "lmcache_environment"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    environment = {
        "LMCACHE_TRACK_USAGE": "false",
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], lmcache]),
    }
    print(f"{OBJECTS} objects of {OBJECT_BYTES >> 20} MiB, {THREADS} threads in each adapter")
    with scratch_folder("lmcache-bench-") as folder:
        command = ["--rounds", str(arguments.rounds), "--folder", str(folder)]
        report(run_apart(__file__, command, environment, RUN_LIMIT_SECONDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
