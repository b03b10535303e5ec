"""scripts/gpu-check, which is made for machines with a GPU, on the mocks and on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import checks
import pytest
import steps
import torch
from cases import Case, cases
from memory import TorchMemory, layer_views

from kvrail.kv_cache import from_tensors

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 300
CHECKS = ("store and load", "blocks used again", "part of a chunk", "damaged file", "at work")
SCRIPT = ROOT / "scripts/gpu-check"
CORRECTNESS = ROOT / "scripts/gpu_check/correctness.py"


def run(command: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def outcomes(results: list[dict[str, str]], step: str) -> set[str]:
    return {result["outcome"] for result in results if result["step"] == step}


def test_everything_passes_on_the_mocks_and_no_time_is_kept(tmp_path: Path, mocks: Path) -> None:
    report_path = tmp_path / "report.json"
    directory = tmp_path / "files"
    directory.mkdir()
    command = [str(SCRIPT), "--mock", str(mocks), "--json", str(report_path), str(directory)]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())
    results = report["results"]
    assert outcomes(results, "install") == outcomes(results, "doctor") == {"passed"}
    assert outcomes(results, "correctness") == {"passed"}
    assert outcomes(results, "sanitizer") == {"skipped"}
    assert outcomes(results, "bench") == {"passed"}
    passed = [r["name"] for r in results if (r["step"], r["outcome"]) == ("correctness", "passed")]
    for case in cases(small=True):
        ways = ["posix", "staged"] + ["direct"] * case.is_block_outermost
        more = [f"{checks.STEP_CHUNKS} chunks at once"] * case.has_large_chunks
        for way, check in itertools.product(ways, [*CHECKS, *more]):
            assert f"{case.name}, {way}: {check}" in passed
    assert all(result["detail"] for result in results)
    assert (report["mock"], report["bench"]) == (True, [])
    assert "on a mock: nothing was measured" in done.stdout
    assert "Mock GPU" in done.stdout
    assert list(directory.iterdir()) == []


def test_a_wrong_byte_fails_a_check(tmp_path: Path, mocks: Path) -> None:
    report = tmp_path / "outcomes.json"
    command = [sys.executable, str(CORRECTNESS), "--directory", str(tmp_path), "--seed", "1"]
    steps.make_machine(tmp_path / "machine")
    command += ["--json", str(report), "--mock", str(mocks), "--few"]
    command += ["--system-root", str(tmp_path / "machine")]
    # Six launches check the kernels when a store opens; a flip there only makes them unused.
    fault = "cuLaunchKernel every=7 flip"
    done = run(
        command,
        tmp_path,
        KVRAIL_MOCK_CUDA_SCRIPT=fault,
        KVRAIL_MOCK_MEMORY_MIB="4096",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [found for found in json.loads(report.read_text()) if found["outcome"] == "failed"]
    assert failed
    assert all("Error: " in found["detail"] for found in failed), failed


def test_the_checks_pass_on_nvidias_own_libcufile(
    tmp_path: Path, mocks: Path, libcufile: Path
) -> None:
    device = os.stat(tmp_path).st_dev
    if os.major(device) == 0:
        pytest.skip(f"{tmp_path} lies on no block device, which cuFile wants")
    machine = tmp_path / "machine"
    steps.make_machine(machine)
    # What the library itself reads, by the preloaded mock of a machine.
    record = machine / f"run/udev/data/b{os.major(device)}:{os.minor(device)}"
    record.write_text("E:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n")
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "libmock_libcuda.so").symlink_to(mocks / "libmock_libcuda.so")
    (folder / "libmock_libcufile.so").symlink_to(libcufile)
    report = tmp_path / "outcomes.json"
    command = [sys.executable, str(CORRECTNESS), "--directory", str(tmp_path), "--seed", "3"]
    command += ["--json", str(report), "--mock", str(folder), "--few"]
    command += ["--system-root", str(machine)]
    done = run(
        command,
        tmp_path,
        LD_PRELOAD=str(mocks / "libmock_machine.so"),
        KVRAIL_MOCK_ROOT=str(machine),
        KVRAIL_MOCK_MEMORY_MIB="4096",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert {result["outcome"] for result in found} == {"passed"}
    for way in ("staged", "direct"):
        first = [result for result in found if f", {way}: store and load" in result["name"]]
        assert first
        assert all("in its compatible mode" in result["detail"] for result in first), first


def check(tmp_path: Path, mocks: Path, *options: str, **environment: str) -> list[dict[str, str]]:
    report = tmp_path / "report.json"
    command = [str(SCRIPT), "--mock", str(mocks), "--json", str(report), *options, str(tmp_path)]
    done = run(command, tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results: list[dict[str, str]] = json.loads(report.read_text())["results"]
    return results


def test_only_what_is_asked_for_is_done(tmp_path: Path, mocks: Path) -> None:
    steps_done = [found["step"] for found in check(tmp_path, mocks, "--only", "doctor")]
    assert steps_done == ["install", "doctor"]
    results = check(tmp_path, mocks, "--only", "bench")
    assert {found["step"] for found in results} == {"install", "bench"}


def test_what_there_is_no_time_for_is_skipped_and_what_was_found_is_kept(
    tmp_path: Path, mocks: Path
) -> None:
    over = "the time that was given is over"
    results = check(tmp_path, mocks, "--seconds", "1")
    assert [found["step"] for found in results if found["detail"] == over] == [
        "doctor", "correctness", "sanitizer", "bench", "bench"
    ]  # fmt: skip
    results = check(
        tmp_path, mocks, "--seconds", "12", "--only", "correctness", "--only", "bench",
        KVRAIL_MOCK_CUDA_SCRIPT="cuLaunchKernel nth=150 hang",
    )  # fmt: skip
    passed = [found for found in results if found["outcome"] == "passed"]
    assert {found["step"] for found in passed} == {"install", "correctness"}
    assert len(passed) > 2
    skipped = [found["name"] for found in results if found["detail"] == over]
    assert len(skipped) == 3
    assert f"after {len(passed) - 1} checks" in skipped[0]


def test_a_wheel_without_the_command_fails(tmp_path: Path) -> None:
    wheel = tmp_path / "kvrail-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kvrail/__init__.py", "")
    done = run([str(SCRIPT), "--wheel", str(wheel), str(tmp_path)], tmp_path)
    assert done.returncode == 1
    assert "the wheel has no command kvrail" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_fails_and_says_so(tmp_path: Path) -> None:
    done = run([str(SCRIPT), "--chunks", "1", "--rounds", "1", str(tmp_path)], tmp_path)
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "gpu-check.json").read_text())["results"]
    failed = {found["step"]: found["detail"] for found in results if found["outcome"] == "failed"}
    assert "sees no CUDA device" in failed["correctness"]
    assert "hint:" in failed["bench"]


def test_what_the_sanitizer_looks_at_is_a_part_of_the_checks(tmp_path: Path, mocks: Path) -> None:
    few = [case.name for case in cases(small=True) if case.layout in ("LBNHC", "BLHNC")]
    assert set(steps.SANITIZER_CASES) < set(few)
    command = [sys.executable, str(CORRECTNESS), "--directory", str(tmp_path), "--seed", "1"]
    command += ["--json", str(tmp_path / "outcomes.json"), "--mock", str(mocks), "--few"]
    done = run([*command, "--case", "LBNHC int4"], tmp_path)
    assert done.returncode == 2
    assert "--case LBNHC int4: not among" in done.stderr
    steps.make_machine(tmp_path / "machine")
    command += ["--system-root", str(tmp_path / "machine")]
    for case in steps.SANITIZER_CASES:
        command += ["--case", case]
    done = run(command, tmp_path, KVRAIL_MOCK_MEMORY_MIB="4096")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "outcomes.json").read_text())
    names = {result["name"].partition(":")[0] for result in found}
    [layers, blocks] = steps.SANITIZER_CASES
    assert names == {
        *(f"{layers}, {way}" for way in ("posix", "staged")),
        *(f"{blocks}, {way}" for way in ("posix", "staged", "direct")),
    }


def test_a_way_and_a_kv_cache_can_be_asked_for(tmp_path: Path, mocks: Path) -> None:
    """What has to be tried again on a machine that is lent for minutes."""
    report_path = tmp_path / "report.json"
    command = [str(SCRIPT), "--mock", str(mocks), "--json", str(report_path)]
    command += ["--only", "correctness", "--way", "direct", "--case", "BLNHC bfloat16 GQA"]
    done = run([*command, str(tmp_path / "made" / "for it")], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())
    names = [found["name"] for found in report["results"] if found["step"] == "correctness"]
    wanted = [*CHECKS, f"{checks.STEP_CHUNKS} chunks at once"]
    assert names == [f"BLNHC bfloat16 GQA, direct: {check}" for check in wanted]
    assert len(report["wheel_sha256"]) == 64


def test_an_error_of_any_kind_fails_its_check_and_no_other(
    tmp_path: Path, host_gpu: HostGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(bench: checks.Bench) -> str:
        raise FileNotFoundError("the chunk file")

    monkeypatch.setattr(checks, "load_part", vanished)
    ways = checks.WAYS[:1]
    found = list(checks.run_checks(host_gpu, tmp_path, cases(small=True)[:1], 5, ways))
    failed = [outcome.name for outcome in found if outcome.outcome != "passed"]
    assert failed == ["LBNHC bfloat16 GQA, posix: part of a chunk"]
    assert len(found) == len(CHECKS) + 1


class HostStream:
    """A stream of the CPU, where everything is done at once."""

    cuda_stream = 0

    def synchronize(self) -> None:
        pass


class HostGpu:
    """PyTorch's CPU in the place of its CUDA, so that the code for the latter runs here."""

    name = "host"
    store_options: ClassVar[dict[str, Any]] = {}

    def memory(self, case: Case) -> TorchMemory:
        return TorchMemory(case, torch.device("cpu"), HostStream())


@pytest.fixture
def host_gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: HostStream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(TorchMemory, "_MATRIX", 64)
    return HostGpu()


def test_the_code_for_pytorch_passes_on_its_cpu(tmp_path: Path, host_gpu: HostGpu) -> None:
    some_cases = [case for case in cases(small=True) if case.layout != "BLNHC"]
    posix = [found for found in checks.run_checks(host_gpu, tmp_path, some_cases, 5)
             if ", posix" in found.name]  # fmt: skip
    large = sum(case.has_large_chunks for case in some_cases)
    assert len(posix) == len(CHECKS) * len(some_cases) + large > large > 0
    assert {found.outcome for found in posix} == {"passed"}, posix


def test_what_overwrites_blocks_changes_all_of_them_and_nothing_else(host_gpu: HostGpu) -> None:
    for case in cases(small=True):
        memory = host_gpu.memory(case)
        memory.send(torch.zeros(case.storage_bytes, dtype=torch.int8))
        memory.overwrite([5, 1])
        expected = torch.zeros(case.storage_bytes, dtype=torch.int8)
        for block in (5, 1):
            for offset, count in case.spans(block):
                expected[offset : offset + count] = -1
        assert torch.equal(memory.fetch(), expected), case.name


def test_work_with_a_wrong_result_is_seen(host_gpu: HostGpu) -> None:
    memory = host_gpu.memory(cases(small=True)[0])
    memory.compute()
    assert memory.computed_right()
    memory.compute()
    memory._results[0][3, 4] += 1
    assert not memory.computed_right()


@pytest.mark.parametrize("case", cases(small=True), ids=lambda case: case.name)
def test_spans_are_those_that_the_store_is_told(case: Case) -> None:
    storage = torch.zeros(case.storage_bytes, dtype=torch.int8)
    found = from_tensors(layer_views(case, storage), case.blocks)
    assert found.regions == ((storage.data_ptr(), case.storage_bytes),)
    for block in (0, 7, case.blocks - 1):
        spans = [
            (layer.offset + block * layer.block_stride, layer.block_bytes) for layer in found.layers
        ]
        assert spans == list(case.spans(block))
    merged = from_tensors(layer_views(case, storage), case.blocks).layers
    touching = merged[0].offset + merged[0].block_bytes == merged[1].offset
    assert touching == case.is_block_outermost
