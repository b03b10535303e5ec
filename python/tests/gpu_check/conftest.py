"""Finds the modules of ``scripts/gpu_check``, and builds the mocks that they run on."""

from __future__ import annotations

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
    packages = ["-p", "mock-libcuda", "-p", "mock-libcufile"]
    subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--release", *packages],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
