"""Checks a wheel of kvrail on a machine with a GPU, and measures it there; see scripts/gpu-check.

Prints a table and writes a JSON file, after each step anew. The exit code is 0 only if no check
failed; what was skipped says why. A ratio below its target is reported and is no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import steps
from steps import Machine, Result
from udev import RecordError, records

MODELS = ("llama-3.1-8b", "deepseek-v3")
LAYOUTS = ("lb", "bl")
CHECK_WAYS = ("posix", "staged", "direct")
# On a mock, whose times mean nothing.
MOCK_BENCH = ["--model", "smollm2-135m", "--chunks", "2", "--rounds", "1", "--memory-mib", "24"]
STEPS = ("doctor", "correctness", "sanitizer", "bench")
OUTCOMES = ("passed", "measured", "skipped", "failed")


def main() -> int:
    """Runs all steps."""
    arguments = _arguments()
    wheel = arguments.wheel or _built_wheel()
    scratch = Path(tempfile.mkdtemp(prefix="kvrail-gpu-check-"))
    try:
        directories = arguments.directories
        if not directories:
            (scratch / "files").mkdir()
            directories = [scratch / "files"]
        machine = Machine(
            wheel=wheel.resolve(),
            scratch=scratch,
            directories=[directory.resolve() for directory in directories],
            ordinal=arguments.ordinal,
            seed=arguments.seed,
            mock=arguments.mock.resolve() if arguments.mock else None,
            checks=[
                *(option for case in arguments.case or [] for option in ("--case", case)),
                *(option for way in arguments.way or [] for option in ("--way", way)),
            ],
            deadline=time.monotonic() + arguments.seconds,
        )
        for directory in machine.directories:
            directory.mkdir(parents=True, exist_ok=True)
        machine.prepare()
        with records(directories if arguments.udev_records else []) as written:
            report = _run(machine, arguments, [str(path) for path in written])
    except RecordError as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _print_summary(report, arguments.json)
    return int(any(result["outcome"] == "failed" for result in report["results"]))


def _run(
    machine: Machine, arguments: argparse.Namespace, udev_records: list[str]
) -> dict[str, Any]:
    start = time.time()
    results: list[Result] = []
    report: dict[str, Any] = {
        "mock": machine.mock is not None,
        "wheel": machine.wheel.name,
        "wheel_sha256": hashlib.sha256(machine.wheel.read_bytes()).hexdigest(),
        "seed": machine.seed,
        "udev_records": udev_records,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "python": platform.python_version(),
        "correctness": {},
        "doctor": None,
        "bench": [],
    }

    def add(*more: Result) -> None:
        for result in more:
            results.append(result)
            print(f"{result.outcome:8}  {result.step:11}  {result.name}: {result.detail}")
        sys.stdout.flush()
        # After each step: a machine that is lent for a while takes nothing away with it.
        report["seconds"] = round(time.time() - start, 1)
        report["results"] = [dataclasses.asdict(result) for result in results]
        written = arguments.json.with_name(arguments.json.name + ".new")
        written.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        written.replace(arguments.json)

    def is_on(step: str, name: str) -> bool:
        """Whether a step is wanted and there is time for it."""
        if step not in arguments.steps:
            return False
        if machine.left() < steps.STEP_MIN_SECONDS:
            add(steps.out_of_time(step, name))
            return False
        return True

    installed = steps.install(machine)
    add(installed)
    if installed.outcome != "passed":
        return report
    if is_on("doctor", "kvrail doctor"):
        doctor, report["doctor"] = steps.doctor(machine)
        add(doctor)
    for directory in machine.directories:
        if is_on("correctness", str(directory)):
            outcomes, found = steps.correctness(machine, directory)
            report["correctness"][str(directory)] = found
            add(*outcomes)
    if is_on("sanitizer", "compute-sanitizer"):
        add(steps.sanitizer(machine, machine.directories[0]))
    for directory in machine.directories:
        for options in _bench_options(machine, arguments):
            if is_on("bench", f"{directory} {' '.join(options)}"):
                outcomes, measured = steps.bench(machine, directory, options)
                report["bench"] += [measured] if measured is not None else []
                add(*outcomes)
    return report


def _bench_options(machine: Machine, arguments: argparse.Namespace) -> list[list[str]]:
    if machine.mock is not None:
        return [[*MOCK_BENCH, "--layout", layout] for layout in LAYOUTS]
    rounds = ["--rounds", str(arguments.rounds), "--chunks", str(arguments.chunks)]
    # Half of it for the chunks of one wave: the longer a wave, the less a disk's moods matter.
    rounds += ["--memory-mib", str(arguments.memory_mib)]
    return [
        ["--model", model, "--layout", layout, *rounds]
        for model in arguments.model or MODELS
        for layout in arguments.layout or LAYOUTS
    ]


def _print_summary(report: dict[str, Any], path: Path) -> None:
    """States where this ran, and how many checks had which outcome."""
    print()
    for line in _facts(report):
        print(line)
    counts = Counter((found["step"], found["outcome"]) for found in report["results"])
    print(f"\n{'':12}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for step in dict.fromkeys(found["step"] for found in report["results"]):
        numbers = "".join(f"{counts[step, outcome]:>10}" for outcome in OUTCOMES)
        print(f"{step:12}{numbers}")
    for found in report["results"]:
        if found["outcome"] == "failed":
            print(f"\nfailed: {found['step']}: {found['name']}: {found['detail']}")
    if report["mock"]:
        print("\non a mock: nothing was measured")
    print(f"\nwritten to {path}")


def _facts(report: dict[str, Any]) -> list[str]:
    """Kernel, driver, devices, file systems and libcufile, as doctor found them."""
    doctor = report["doctor"]
    if doctor is None:
        return ["machine: unknown, `kvrail doctor` did not answer"]
    machine = doctor["machine"]

    def library(name: str) -> dict[str, Any]:
        return (machine.get(name) or {}).get("library") or {}

    system = machine["system"]
    driver, kernel = system["driver"] or {}, system["kernel"]
    cuda, cufile = library("libcuda"), library("libcufile")
    lines = [
        f"kernel {kernel}, driver {driver.get('version', 'unknown')}, "
        f"CUDA {cuda.get('cuda_version', 'unknown')}, libcufile {cufile.get('version', 'none')}"
    ]
    for device in cuda.get("devices", []):
        lines.append(
            f"cuda:{device['ordinal']} {device['name']}, {device['memory_bytes'] >> 20} MiB, "
            f"{device['pci_address']}, compute capability {device['compute_capability']}"
        )
    for directory in doctor["directories"]:
        mount = directory.get("mount") or {}
        lines.append(f"{directory['path']}: {mount.get('file_system', 'unknown')}")
    lines += [f"udev record written for this run: {path}" for path in report["udev_records"]]
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="DIR", help="where to write files")
    add("--wheel", type=Path, help="default: what `make build` left in this checkout")
    add("--json", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    add("--ordinal", type=int, default=0, metavar="N", help="which GPU; default: 0")
    add("--seed", type=int, default=random.randrange(1 << 32), help="default: another each time")
    add("--rounds", type=int, default=5, help="of each benchmark; default: 5")
    add("--chunks", type=int, default=32, help="of each round; default: 32")
    add(
        "--memory-mib",
        type=int,
        default=4096,
        help="KV cache of the benchmark; a wave moves half of it at most; default: %(default)s",
    )
    add("--only", dest="steps", action="append", choices=STEPS, help="only this step; repeatable")
    add("--model", action="append", choices=MODELS, help="of the benchmark only this; repeatable")
    add("--layout", action="append", choices=LAYOUTS, help="likewise")
    add("--way", action="append", choices=CHECK_WAYS, help="of the checks only this; repeatable")
    add("--case", action="append", help="of the checks only this KV cache; repeatable")
    add("--seconds", type=float, default=float("inf"), help="for all; what is left is skipped")
    add(
        "--udev-records",
        action="store_true",
        help="write the udev records that the machine lacks and cuFile needs, for the time of this "
        "run; as root, where no udev runs",
    )
    add("--mock", type=Path, metavar="DIR", help="use the mock libraries in DIR, no GPU")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or list(STEPS)
    return arguments


def _built_wheel() -> Path:
    folder = Path(__file__).resolve().parents[2] / "target/python/wheels"
    wheels = sorted(folder.glob("kvrail-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"error: {len(wheels)} wheels in {folder}\nhint: give --wheel FILE")
    return wheels[0]


if __name__ == "__main__":
    sys.exit(main())
