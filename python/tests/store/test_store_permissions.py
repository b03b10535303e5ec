"""Directories that this user may not use: an error that names the setting, or loads only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

OPEN = """
import sys
from kvrail import Config, Namespace, Store
config = Config.resolve(None, {"KVRAIL_GDS_PATH": sys.argv[1]}, None)
try:
    store = Store(config, Namespace("m", "{}"))
except Exception as error:
    print(type(error).__name__, error)
else:
    print("opened", [mount["writable"] for mount in store.describe()], store.take_notices())
"""


def _parent_forbids(folder: Path) -> Path:
    folder.chmod(0o500)
    return folder / "cache"


def _closed(folder: Path) -> Path:
    folder.chmod(0)
    return folder


def _not_searchable(folder: Path) -> Path:
    folder.chmod(0o600)
    return folder


@pytest.fixture
def without_root() -> list[str]:
    """The prefix under which permissions count, also for root."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root may do anything, and `setpriv` to drop that right is not installed")
    capabilities = "-dac_override,-dac_read_search"
    return [setpriv, f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]


def _open(prefix: list[str], path: Path) -> str:
    command = [*prefix, sys.executable, "-c", OPEN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("forbid", [_parent_forbids, _closed, _not_searchable])
def test_a_directory_that_cannot_be_used_ends_the_start(
    tmp_path: Path, without_root: list[str], forbid: Callable[[Path], Path]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = forbid(folder)
    answer = _open(without_root, path)
    folder.chmod(0o700)
    assert answer.startswith("ConfigError"), answer
    assert f"`gds_path` = {path}: expected a directory that this user can" in answer
    assert "Permission denied" in answer


def test_a_directory_that_can_only_be_read_is_read(tmp_path: Path, without_root: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    answer = _open(without_root, folder)
    folder.chmod(0o700)
    assert answer.startswith("opened [False]"), answer
    assert "cannot write here, chunks are loaded only" in answer
