"""Runs the checks in a process of its own and writes their outcomes as JSON.

A process of its own, since what is checked can end it: a wrong address on a GPU, or in the mock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from cases import cases
from checks import WAYS, run_checks
from memory import Gpu, TorchGpu
from mock_memory import MockGpu
from outcome import Outcome


def main() -> int:
    """Runs the checks; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--ordinal", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--mock", type=Path, help="the folder of the mock libraries")
    parser.add_argument("--system-root", type=Path, help="the machine that goes with them")
    parser.add_argument("--few", action="store_true", help="small KV caches of two layouts")
    parser.add_argument(
        "--case", action="append", help="only the KV cache of this name; repeatable"
    )
    parser.add_argument(
        "--way", action="append", choices=[way.name for way in WAYS], help="only this; repeatable"
    )
    arguments = parser.parse_args()
    gpu: Gpu
    if arguments.mock is not None:
        gpu = MockGpu(arguments.mock, arguments.system_root, arguments.ordinal)
    else:
        gpu = TorchGpu(arguments.ordinal)
    some_cases = cases(small=arguments.few or arguments.mock is not None)
    if arguments.few:
        some_cases = [case for case in some_cases if case.layout in ("LBNHC", "BLHNC")]
    for name in arguments.case or []:
        if name not in [case.name for case in some_cases]:
            parser.error(f"--case {name}: not among {[case.name for case in some_cases]}")
    if arguments.case:
        some_cases = [case for case in some_cases if case.name in arguments.case]
    outcomes: list[Outcome] = []
    folder = Path(tempfile.mkdtemp(prefix=".kvrail-gpu-check-", dir=arguments.directory))
    try:
        ways = tuple(way for way in WAYS if way.name in (arguments.way or [way.name]))
        for outcome in run_checks(gpu, folder, some_cases, arguments.seed, ways):
            outcomes.append(outcome)
            print(f"{outcome.outcome}: {outcome.name}: {outcome.detail}", flush=True)
            # After each: what was found must not be lost with the process.
            text = json.dumps([dataclasses.asdict(found) for found in outcomes])
            written = arguments.json.with_name(arguments.json.name + ".new")
            written.write_text(text, encoding="utf-8")
            written.replace(arguments.json)
            for done in folder.iterdir():
                shutil.rmtree(done, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(outcome.outcome == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
