"""Asks LMCache, which is never imported here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PEER_SECONDS = 240.0
# The start of LMCache's hash chains follows from it.
HASH_SEED = "0"

Ask = Callable[..., list[Any]]


def _asking(script: str, environment: dict[str, str]) -> Ask:
    def ask(*questions: tuple[str, Any]) -> list[Any]:
        done = subprocess.run(
            [sys.executable, str(HERE / script)],
            input=json.dumps(questions),
            env=environment | {"PYTHONHASHSEED": HASH_SEED},
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        answers: list[Any] = json.loads(done.stdout)
        return answers

    return ask


@pytest.fixture(scope="session")
def ask_format(lmcache_environment: dict[str, str]) -> Ask:
    """Asks for LMCache's heads and names."""
    return _asking("lmcache_peer.py", lmcache_environment)


@pytest.fixture(scope="session")
def ask_backend(lmcache_environment: dict[str, str]) -> Ask:
    """Asks LMCache's `GdsBackend` on host memory, and its token database."""
    return _asking("gds_peer.py", lmcache_environment)
