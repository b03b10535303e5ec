"""Finds the modules of ``scripts/gpu_check``, and builds the mocks that they run on."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts/gpu_check"))


@pytest.fixture(scope="session")
def mocks() -> Path:
    """The folder of the mock libraries, built in release mode."""
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo, to build the mocks")
    packages = ["-p", "mock-libcuda", "-p", "mock-libcufile", "-p", "mock-machine"]
    subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--release", *packages],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"


@pytest.fixture(scope="session")
def libcufile() -> Path:
    """NVIDIA's own: the newest that a variable names, or that of the environment's wheels."""
    if named := os.environ.get("KVRAIL_CUFILE_LIBRARIES"):
        found = [Path(path) for path in named.split(":")]
    else:
        wheels = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libcufile.so.0")
        found = list(wheels)
    if not found:
        pytest.skip(f"no libcufile.so.0 in the wheels of {sys.prefix}")
    return max(found, key=version)


def version(library: Path) -> int:
    """The version of a libcufile, as it tells it."""
    number = ctypes.c_int()
    ctypes.CDLL(str(library)).cuFileGetVersion(ctypes.byref(number))
    return number.value
