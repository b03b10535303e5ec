"""What tests of all folders share: LMCache from its published wheel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def lmcache_environment() -> dict[str, str]:
    """The environment of processes that import LMCache beside kvrail.

    LMCache is never imported into the process of the tests: kvrail's connector takes over one of
    its names where it is not there, which other tests are about.
    """
    made = subprocess.run(
        [REPOSITORY / "scripts" / "lmcache_environment"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = made.stdout.strip()
    behind = [part for part in (os.environ.get("PYTHONPATH"), folder) if part]
    # It reports its usage over the network unless told otherwise; the tests are for loopback only.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(behind), "LMCACHE_TRACK_USAGE": "false"}
