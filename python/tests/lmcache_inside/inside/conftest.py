"""Fixtures of the tests that import LMCache: an L1 slab of its own classes, and adapters on it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[4] / "scripts"))

# `test_inside_lmcache.py` runs them where it is installed.
collect_ignore_glob = [] if importlib.util.find_spec("lmcache") else ["test_*.py"]


@pytest.fixture
def l1() -> Any:
    """An L1 of 64 MiB."""
    from lmcache_slab import L1

    return L1(64 << 20)


@pytest.fixture
def adapters(l1: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes adapters on the L1, in one directory unless told otherwise; closes them."""
    from lmcache_server import kvrail_adapter
    from lmcache_slab import Driver

    made: list[Any] = []

    def make(**params: Any) -> Any:
        driver = Driver(kvrail_adapter(tmp_path / "kv", **params), l1)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.adapter.close()
