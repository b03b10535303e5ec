"""What is done on the machine, one step after the other, each in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Far above what each takes, so that a hang ends.
CHECKS_LIMIT_SECONDS = 1800
SANITIZER_LIMIT_SECONDS = 1800
COMMAND_LIMIT_SECONDS = 1200
# Of all kernels kvrail's: PyTorch's are others' business, and take minutes. Calls of the driver
# that fail are not counted: cuFileDriverOpen of libcufile 1.15 itself frees what it never
# allocated. Those of kvrail fail a check, since it looks at each one's status.
SANITIZER_OPTIONS = (
    *("--tool", "memcheck", "--error-exitcode", "9"),
    *("--kernel-name", "kernel_substring=kvrail_", "--report-api-errors", "no"),
)
# One with pieces of half pages in a list of layers, one with whole blocks: each check takes seconds
# there, and between them they have all ways.
SANITIZER_CASES = ("LBNHC float8_e4m3fn MLA", "BLHNC bfloat16 GQA")
# Less than any step takes: one with so little time left is not begun.
STEP_MIN_SECONDS = 5
# The status of a command that was ended at its limit.
TIMED_OUT = 124
# Lines of a process that failed that are kept.
TAIL_LINES = 15


@dataclass(frozen=True)
class Result:
    """A line of the table: ``passed``, ``failed``, ``skipped`` or ``measured``, and why."""

    step: str
    name: str
    outcome: str
    detail: str


@dataclass
class Machine:
    """Where and with what everything runs."""

    wheel: Path
    scratch: Path
    directories: list[Path]
    ordinal: int
    seed: int
    mock: Path | None
    checks: list[str] = field(default_factory=list)
    """Options that choose among the checks."""
    deadline: float = float("inf")
    """When all steps must be over, by ``time.monotonic``."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def site(self) -> Path:
        """Where the wheel is installed."""
        return self.scratch / "site"

    @property
    def command(self) -> Path:
        """The command of the wheel."""
        return self.site / "bin" / "kvrail"

    @property
    def system_root(self) -> Path:
        """The machine of a mock, as files."""
        return self.scratch / "machine"

    @property
    def mock_options(self) -> list[str]:
        """What the commands are told on a mock."""
        return [] if self.mock is None else ["--system-root", str(self.system_root)]

    def prepare(self) -> None:
        """Sets the environment of all processes up."""
        environment = dict(os.environ)
        environment["PYTHONPATH"] = str(self.site)
        if self.mock is not None:
            libraries = self.scratch / "libraries"
            libraries.mkdir()
            (libraries / "libcuda.so.1").symlink_to(self.mock / "libmock_libcuda.so")
            environment["LD_LIBRARY_PATH"] = str(libraries)
            environment["KVRAIL_MOCK_LIBCUDA"] = str(self.mock / "libmock_libcuda.so")
            environment["KVRAIL_CUFILE_LIBRARY"] = str(self.mock / "libmock_libcufile.so")
            # The checks do not give memory back before they end.
            environment["KVRAIL_MOCK_MEMORY_MIB"] = "4096"
            make_machine(self.system_root)
        self.environment = environment

    def left(self) -> float:
        """Seconds left for all steps."""
        return self.deadline - time.monotonic()

    def run(self, command: list[str], limit_seconds: float) -> tuple[int, str, str]:
        """Runs a command; returns its status (124 at the limit), stdout and stderr."""
        limit_seconds = min(limit_seconds, max(self.left(), STEP_MIN_SECONDS))
        with subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A process group of its own: compute-sanitizer starts what it looks at.
            start_new_session=True,
        ) as process:
            try:
                output, error = process.communicate(timeout=limit_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                return TIMED_OUT, output, f"no end after {limit_seconds:.0f} s"
            return process.returncode, output, error


def install(machine: Machine) -> Result:
    """Puts the wheel into a folder of its own; needs no network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--target", str(machine.site), str(machine.wheel)]
    status, _, error = machine.run(command, COMMAND_LIMIT_SECONDS)
    how = "by pip"
    if status != 0:
        how = f"unpacked, pip did not: {tail(error, 1)}"
        shutil.rmtree(machine.site, ignore_errors=True)
        with zipfile.ZipFile(machine.wheel) as archive:
            archive.extractall(machine.site)
        (machine.site / "bin").mkdir()
        for script in machine.site.glob("*.data/scripts/*"):
            target = machine.site / "bin" / script.name
            shutil.move(script, target)
            target.chmod(0o755)
    if not machine.command.is_file():
        return Result("install", machine.wheel.name, "failed", "the wheel has no command kvrail")
    status, version, error = machine.run([str(machine.command), "--version"], 60)
    if status != 0:
        return Result("install", machine.wheel.name, "failed", tail(error))
    return Result("install", machine.wheel.name, "passed", f"{version.strip()}, {how}")


def correctness(machine: Machine, directory: Path) -> tuple[list[Result], list[Any]]:
    """Runs the checks in a directory."""
    outcomes = machine.scratch / "correctness.json"
    outcomes.unlink(missing_ok=True)
    command = [*_checks(machine, directory, outcomes), *machine.checks]
    status, _, error = machine.run(command, CHECKS_LIMIT_SECONDS)
    found = _read_json(outcomes) or []
    results = [
        Result("correctness", check["name"], check["outcome"], check["detail"]) for check in found
    ]
    if status == TIMED_OUT and machine.left() <= 0:
        rest = out_of_time("correctness", f"{directory}, after {len(found)} checks")
        return [*results, rest], found
    has_failed = any(result.outcome == "failed" for result in results)
    if not found or status not in (0, 1) or (status == 1 and not has_failed):
        detail = f"{ended(status)} after {len(found)} checks: {tail(error)}"
        results.append(Result("correctness", str(directory), "failed", detail))
    return results, found


def sanitizer(machine: Machine, directory: Path) -> Result:
    """Runs a few of the checks under compute-sanitizer, where the machine has it."""
    name = "compute-sanitizer --tool memcheck"
    program = shutil.which("compute-sanitizer")
    if machine.mock is not None:
        return Result("sanitizer", name, "skipped", "a mock has no kernels to look at")
    if program is None:
        return Result("sanitizer", name, "skipped", "compute-sanitizer is not on PATH")
    outcomes = machine.scratch / "sanitizer.json"
    command = [program, *SANITIZER_OPTIONS]
    command += [*_checks(machine, directory, outcomes), "--few"]
    for case in SANITIZER_CASES:
        command += ["--case", case]
    status, output, error = machine.run(command, SANITIZER_LIMIT_SECONDS)
    counts = Counter(check["outcome"] for check in _read_json(outcomes) or [])
    checks = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none"
    if status == TIMED_OUT and machine.left() <= 0:
        return out_of_time("sanitizer", f"{name}, checks: {checks}")
    if status == 0 and counts["passed"] > 0:
        return Result("sanitizer", name, "passed", f"no error; checks: {checks}")
    return Result("sanitizer", name, "failed", f"{ended(status)}: {tail(output + error)}")


def doctor(machine: Machine) -> tuple[Result, Any]:
    """Asks ``kvrail doctor`` about the machine and the directories."""
    command = [str(machine.command), "doctor", "--json", *machine.mock_options]
    command += map(str, machine.directories)
    status, output, error = machine.run(command, COMMAND_LIMIT_SECONDS)
    try:
        report = json.loads(output)
    except json.JSONDecodeError:
        return Result("doctor", "kvrail doctor", "failed", f"{ended(status)}: {tail(error)}"), None
    engines = ", ".join(
        f"{directory.get('path')}: {(directory.get('engine') or {}).get('name', 'no engine')}"
        for directory in report.get("directories", [])
    )
    outcome = "passed" if status == 0 else "failed"
    return Result("doctor", "kvrail doctor", outcome, engines or ended(status)), report


def bench(machine: Machine, directory: Path, options: list[str]) -> tuple[list[Result], Any]:
    """Runs ``kvrail bench`` on the GPU in a directory; times of a mock are not kept."""
    path = machine.scratch / "bench.json"
    command = [str(machine.command), "bench", "--device", f"cuda:{machine.ordinal}"]
    command += ["--path", str(directory), "--json", str(path), *options, *machine.mock_options]
    status, _, error = machine.run(command, COMMAND_LIMIT_SECONDS)
    name = f"{directory} {' '.join(options)}"
    report = _read_json(path)
    path.unlink(missing_ok=True)
    if status == TIMED_OUT and machine.left() <= 0:
        return [out_of_time("bench", name)], None
    if status != 0 or report is None:
        return [Result("bench", name, "failed", f"{ended(status)}: {tail(error)}")], None
    models = report["models"]
    verified = sum(model["verified_chunks"] for model in models)
    results = [Result("bench", name, "passed", f"{verified} chunks compared")]
    for model in models:
        results += [
            Result("bench", f"{model['model']}: {entry['what']}", "skipped", entry["reason"])
            for entry in model["skipped"]
        ]
    if machine.mock is not None:
        return results, None
    return results + _ratios(models), report


def _ratios(models: list[Any]) -> list[Result]:
    """A line for each ratio that has a target. One that is missed is no failure of the check."""
    results = []
    for model in models:
        rows = [
            (f"{copy['work']}, {copy['method']}, against a plain copy", copy["ratio"],
             copy["target"])
            for copy in model["copies"] if copy["target"] is not None
        ]  # fmt: skip
        rows += [
            (f"{move['operation']}, {move['way']}, against {move['limit']}", move["ratio"],
             move["target"])
            for move in model["moves"]
        ]  # fmt: skip
        for name, ratio, target in rows:
            met = "met" if ratio["median"] >= target else "missed"
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
            detail = f"{spread}, target {target:.2f}: {met}"
            results.append(Result("bench", f"{model['model']}: {name}", "measured", detail))
        for move in model["moves"]:
            if move["held_share"] is None:
                continue
            share, target = move["held_share"]["median"], move["held_target"]
            met = "met" if share < target else "missed"
            detail = f"{share:.2%} of the I/O time, target below {target:.0%}: {met}"
            name = f"{model['model']}: compute stream held, {move['way']}"
            results.append(Result("bench", name, "measured", detail))
    return results


def out_of_time(step: str, name: str) -> Result:
    """What did not fit into ``--seconds``."""
    return Result(step, name, "skipped", "the time that was given is over")


def make_machine(root: Path) -> None:
    """Makes a machine of files on which cuFile may be tried: NVMe at ``/``, udev, nvidia-fs."""
    nvme = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0"
    files = {
        "proc/modules": "nvme 1 2 - Live 0x0\n",
        "proc/sys/kernel/osrelease": "6.8.0-51-generic\n",
        "proc/driver/nvidia-fs/version": "version: 2.26\n",
        "proc/self/mountinfo": "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n",
        "dev/nvidia-fs0": "",
        "run/udev/data/b259:2": "E:ID_FS_TYPE=ext4\n",
        f"{nvme}/transport": "pcie\n",
        f"{nvme}/nvme0n1/nvme0n1p2/partition": "2\n",
    }
    links = {
        f"{nvme}/nvme0n1/device": "../../nvme0",
        "sys/dev/block/259:2": f"../../../{nvme}/nvme0n1/nvme0n1p2",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """The last lines of what a process said, in one."""
    return " | ".join(line for line in text.strip().splitlines()[-lines:] if line.strip())


def ended(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit code {status}"


def _checks(machine: Machine, directory: Path, outcomes: Path) -> list[str]:
    command = [sys.executable, str(HERE / "correctness.py"), "--directory", str(directory)]
    command += ["--json", str(outcomes), "--seed", str(machine.seed)]
    command += ["--ordinal", str(machine.ordinal)]
    if machine.mock is not None:
        command += ["--mock", str(machine.mock), *machine.mock_options]
    return command


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
