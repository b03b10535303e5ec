"""Runs the tests of `inside`, which import LMCache, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).resolve().parent / "inside"
SECONDS = 300.0


@pytest.mark.parametrize("name", sorted(path.name for path in INSIDE.glob("test_*.py")))
def test_with_the_published_wheel(name: str, lmcache_environment: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--timeout=120",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run(
        [*command, str(INSIDE / name)],
        env=lmcache_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    print(ran.stdout[-8000:])
    # 0 is "all passed"; that nothing was collected is another.
    assert ran.returncode == 0
