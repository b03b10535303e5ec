"""A bad chunk is a miss: reported, counted, set aside, and nothing else suffers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chunk_damage import DAMAGES, Damage
from store_harness import (
    LIMIT_SECONDS,
    Geometry,
    HostMemory,
    chunk_path,
    key,
    load_chunks,
    lookup,
    namespace,
    open_store,
    parent,
    store_chunks,
)
from store_process import run_job

from kvrail._core import Store

GEOMETRY = Geometry()
SOURCES = {0: [3, 1, 4, 15], 1: [9, 2, 6, 5], 2: [30, 8, 7, 11]}
TARGETS = {0: [16, 17, 18, 19], 1: [23, 22, 21, 20], 2: [24, 0, 26, 10]}


@pytest.fixture
def source(tmp_path: Path) -> HostMemory:
    """Memory whose blocks in ``SOURCES`` are stored as chunks 0, 1 and 2."""
    memory = HostMemory(GEOMETRY, seed=1)
    with open_store(tmp_path / "store") as store:
        assert store_chunks(memory.attach(store), SOURCES).stored == 3
    return memory


def check_miss(store: Store, source: HostMemory, chunk: Path, *, damaged: bool) -> None:
    """Loads all three chunks of which chunk 1 is bad, and then again after storing it anew."""
    target = HostMemory(GEOMETRY, seed=2)
    before = target.copy()
    kv_cache = target.attach(store)
    report = load_chunks(kv_cache, TARGETS)
    assert (report.loaded, report.failed, len(report.errors)) == (2, [1], 1)
    assert key(1).hex() in report.errors[0], report.errors
    for index in (0, 2):
        assert target.blocks(TARGETS[index]) == source.blocks(SOURCES[index])
    assert target.untouched(before, [block for blocks in TARGETS.values() for block in blocks])

    metrics = store.metrics()
    assert (metrics["chunks_loaded"], metrics["loads_failed"]) == (2, 1)
    assert metrics["chunks_damaged"] == metrics["chunks_set_aside"] == int(damaged)
    assert metrics["chunks_missing"] == int(not damaged)
    assert not os.path.lexists(chunk)
    warnings = [message for level, message in store.take_notices() if level == "warning"]
    assert sum("bad chunk" in message for message in warnings) == int(damaged), warnings

    assert lookup(store, range(3)) == 1
    assert store_chunks(source.attach(store), {1: SOURCES[1]}).stored == 1
    assert lookup(store, range(3)) == 3
    assert load_chunks(kv_cache, {1: TARGETS[1]}).failed == []
    assert target.blocks(TARGETS[1]) == source.blocks(SOURCES[1])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_chunk_is_a_miss(tmp_path: Path, source: HostMemory, damage: Damage) -> None:
    path, outside = tmp_path / "store", tmp_path / "outside"
    chunk = chunk_path(path, 1)
    good = chunk.read_bytes()
    damage(chunk, GEOMETRY.payload_bytes, chunk_path(path, 0), outside)
    with open_store(path) as store:
        assert lookup(store, range(3)) == 3
        check_miss(store, source, chunk, damaged=True)
    if outside.exists():
        assert outside.read_bytes() == good
    kept = sorted((path / namespace().directory_name / "quarantine").iterdir())
    assert len(kept) == 2 and kept[0].name.endswith(chunk.name)
    assert kept[1].name == f"{kept[0].name}.json"
    assert json.loads(kept[1].read_text())["reason"]


def test_a_chunk_deleted_between_lookup_and_load_is_a_miss(
    tmp_path: Path, source: HostMemory
) -> None:
    chunk = chunk_path(tmp_path / "store", 1)
    with open_store(tmp_path / "store") as store:
        assert lookup(store, range(3)) == 3
        chunk.unlink()
        check_miss(store, source, chunk, damaged=False)


def test_the_instance_that_wrote_a_chunk_does_not_trust_it_either(tmp_path: Path) -> None:
    source = HostMemory(GEOMETRY, seed=1)
    chunk = chunk_path(tmp_path, 1)
    with open_store(tmp_path) as store:
        store_chunks(source.attach(store), SOURCES)
        DAMAGES["bit in the middle page"](chunk, GEOMETRY.payload_bytes, chunk, chunk)
        target = HostMemory(GEOMETRY, seed=2)
        assert load_chunks(target.attach(store), TARGETS).failed == [1]
        assert store_chunks(source.attach(store), {1: SOURCES[1]}).stored == 1
        assert load_chunks(target.attach(store), TARGETS).failed == []
    assert target.blocks(TARGETS[1]) == source.blocks(SOURCES[1])


def test_an_unreadable_chunk_is_a_miss(tmp_path: Path, source: HostMemory) -> None:
    """In a process of its own: root reads any file until it gives that capability up."""
    path = tmp_path / "store"
    chunk = chunk_path(path, 1)
    chunk.chmod(0)
    prefix: list[str] = []
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root reads every file, and `setpriv` to drop that right is not installed")
        capabilities = "-dac_override,-dac_read_search"
        prefix = [setpriv, f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]
        tried = subprocess.run([*prefix, "cat", str(chunk)], capture_output=True, text=True)
        if "Permission denied" not in tried.stderr:
            pytest.skip(f"root cannot give up reading every file here: {tried.stderr!r}")
    answer = run_job(
        {"action": "load", "path": str(path), "seed": 2, "chunks": TARGETS}, prefix=prefix
    )
    assert (answer["loaded"], answer["failed"]) == (2, [1])
    assert answer["metrics"]["chunks_damaged"] == answer["metrics"]["chunks_set_aside"] == 1
    for index in (0, 2):
        assert answer["blocks"][str(index)] == source.blocks(SOURCES[index]).hex()
    assert not os.path.lexists(chunk)
    with open_store(path) as store:
        assert store_chunks(source.attach(store), {1: SOURCES[1]}).stored == 1
        target = HostMemory(GEOMETRY, seed=3)
        assert load_chunks(target.attach(store), TARGETS).failed == []


@pytest.mark.parametrize("read_only", [False, True], ids=["read and write", "read-only"])
def test_damage_outside_the_wanted_blocks_is_told_from_damage_inside(
    tmp_path: Path, source: HostMemory, read_only: bool
) -> None:
    """A partial load verifies what it reads; a read-only store leaves a bad file where it is."""
    path = tmp_path / "store"
    chunk = chunk_path(path, 1)
    DAMAGES["bit in the last page"](chunk, GEOMETRY.payload_bytes, chunk, chunk)
    target = HostMemory(GEOMETRY, seed=2)
    with open_store(path, read_only=read_only) as store:
        item = (key(1), parent(1), 2, TARGETS[1][2:])
        report = target.attach(store).load([item]).wait(LIMIT_SECONDS)
        assert report.failed == [0]
        assert store.metrics()["chunks_set_aside"] == int(not read_only)
    assert chunk.exists() == read_only
