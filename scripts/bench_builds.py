"""Measures two builds of the command `kvrail` against each other, in turn.

    scripts/within python scripts/bench_builds.py OLD NEW [--model MODEL] [--pairs N]

Each pair is one short `kvrail bench` of either build, the one in front changing. The ratio of a
pair is that of its GB/s: a machine moves less within a pair than between runs of one build.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine_run import scratch_folder, spread

OPERATIONS = ("store", "load")
RUN_LIMIT_SECONDS = 300.0


def measure(program: Path, folder: Path, model: str, chunks: int) -> dict[str, Any]:
    """The report of one run for the model."""
    command = [program, "bench", "--path", folder, "--model", model, "--chunks", str(chunks)]
    command += ["--rounds", "2", "--no-fio", "--engine", "posix", "--json"]
    ran = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=RUN_LIMIT_SECONDS
    )
    report: dict[str, Any] = json.loads(ran.stdout)["models"][0]
    return report


def main() -> int:
    """Runs the pairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", default="llama-3.1-70b-tp8")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    builds = {"old": arguments.old.absolute(), "new": arguments.new.absolute()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
    with scratch_folder("builds-") as folder:
        for number in range(arguments.pairs):
            for name in builds if number % 2 == 0 else reversed(builds):
                found[name].append(measure(builds[name], folder, arguments.model, arguments.chunks))
    print(f"{arguments.model}, {arguments.chunks} chunks, {arguments.pairs} pairs in turn")
    print("| operation | old GB/s | new GB/s | new against old | CPU s/GB: old, new |")
    print("| --- | --- | --- | --- | --- |")
    for operation in OPERATIONS:
        old, new = ([run[operation]["kvrail"] for run in found[name]] for name in builds)
        speeds = [[one["gb_per_second"]["median"] for one in side] for side in (old, new)]
        ratios = [after / before for before, after in zip(*speeds, strict=True)]
        cpu = [
            statistics.median(one["cpu_seconds_per_gb"]["median"] for one in side)
            for side in (old, new)
        ]
        cells = [operation, *map(spread, speeds), spread(ratios), f"{cpu[0]:.2f}, {cpu[1]:.2f}"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
