"""Bytes that go in come out, whatever the layout; nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_harness import (
    LIMIT_SECONDS,
    Geometry,
    HostMemory,
    key,
    load_chunks,
    lookup,
    open_store,
    parent,
    store_chunks,
)

GEOMETRIES = {
    "layer outermost": Geometry(),
    "layer outermost, gaps": Geometry(gap_bytes=512),
    "block outermost": Geometry(outer="block"),
    "block outermost, gaps": Geometry(outer="block", gap_bytes=64),
    "a region for each layer": Geometry(separate=True),
    "layers of different sizes": Geometry(layer_bytes=(4096, 512, 12288)),
    "sizes that are no multiple of anything": Geometry(layer_bytes=(1000, 3, 77), gap_bytes=5),
    "one block of one byte": Geometry(layer_bytes=(1,), blocks_per_chunk=1),
    "many layers": Geometry(layer_bytes=(2048,) * 61, block_count=12, blocks_per_chunk=3),
}


def random_chunks(geometry: Geometry, count: int, seed: int) -> dict[int, list[int]]:
    """Distinct random block ids for each of ``count`` chunks."""
    order = np.random.default_rng(seed).permutation(geometry.block_count).tolist()
    step = geometry.blocks_per_chunk
    return {index: order[index * step : (index + 1) * step] for index in range(count)}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_chunks_come_back_in_other_blocks_of_another_instance(
    tmp_path: Path, geometry: Geometry
) -> None:
    count = geometry.block_count // geometry.blocks_per_chunk
    sources, targets = (random_chunks(geometry, count, seed) for seed in (1, 2))
    source = HostMemory(geometry, seed=3)
    with open_store(tmp_path) as store:
        kv_cache = source.attach(store)
        assert kv_cache.payload_bytes == geometry.payload_bytes
        assert kv_cache.chunk_file_bytes % 4096 == 0
        stored = store_chunks(kv_cache, sources)
        assert (stored.stored, stored.dropped, stored.failed) == (count, 0, 0)
    target = HostMemory(geometry, seed=4)
    before = target.copy()
    with open_store(tmp_path) as store:
        assert lookup(store, range(count)) == count
        # One chunk stays out, so that blocks nobody asked for exist in every geometry.
        wanted = {index: targets[index] for index in range(count - 1)}
        report = load_chunks(target.attach(store), wanted)
        assert (report.loaded, report.failed, report.errors) == (count - 1, [], [])
        assert store.metrics()["bytes_loaded"] == (count - 1) * geometry.payload_bytes
    for index, blocks in wanted.items():
        assert target.blocks(blocks) == source.blocks(sources[index]), f"chunk {index}"
    assert target.untouched(before, [block for blocks in wanted.values() for block in blocks])


@pytest.mark.parametrize("first_block", [1, 2, 3])
@pytest.mark.parametrize("layer_bytes", [(4096, 4096), (1000, 24)], ids=["pages", "odd sizes"])
def test_a_partial_load_touches_only_the_blocks_it_names(
    tmp_path: Path, first_block: int, layer_bytes: tuple[int, ...]
) -> None:
    geometry = Geometry(layer_bytes=layer_bytes)
    source, target = HostMemory(geometry, seed=1), HostMemory(geometry, seed=2)
    before = target.copy()
    with open_store(tmp_path) as store:
        store_chunks(source.attach(store), {0: [9, 4, 7, 1]})
        blocks = [20, 3, 11][first_block - 1 :]
        chunk = (key(0), parent(0), first_block, blocks)
        report = target.attach(store).load([chunk]).wait(LIMIT_SECONDS)
    assert (report.loaded, report.failed) == (1, [])
    assert target.blocks(blocks) == source.blocks([9, 4, 7, 1][first_block:])
    assert target.untouched(before, blocks)


def test_blocks_may_be_reused_as_soon_as_store_returns(tmp_path: Path) -> None:
    geometry = Geometry()
    memory = HostMemory(geometry, seed=1)
    stored = {index: list(range(index * 4, index * 4 + 4)) for index in range(8)}
    expected = {index: memory.blocks(blocks) for index, blocks in stored.items()}
    with open_store(tmp_path) as store:
        kv_cache = memory.attach(store)
        items = [(key(index), parent(index), blocks) for index, blocks in stored.items()]
        ticket = kv_cache.store(items)
        for array in memory.arrays:
            array.fill(0)
        assert ticket.wait(LIMIT_SECONDS).stored == 8
        load_chunks(kv_cache, stored)
    assert all(memory.blocks(blocks) == expected[index] for index, blocks in stored.items())


def test_a_chunk_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    for _ in range(2):
        with open_store(tmp_path) as store:
            kv_cache = memory.attach(store)
            first = store_chunks(kv_cache, {0: range(4)})
            second = store_chunks(kv_cache, {0: range(4), 1: range(4, 8)})
    assert (first.stored, first.already_present) == (0, 1)
    assert (second.stored, second.already_present) == (0, 2)


def test_lookup_finds_the_longest_prefix_present_on_all_ranks(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    with open_store(tmp_path) as store:
        store_chunks(memory.attach(store, rank=0), {index: range(4) for index in range(5)})
        store_chunks(memory.attach(store, rank=1), {index: range(4) for index in (0, 1, 2, 4)})
        store_chunks(memory.attach(store, group=1), {0: range(4)})
    for read_only in (False, True):
        with open_store(tmp_path, read_only=read_only) as store:
            assert lookup(store, range(8)) == 5
            assert lookup(store, range(8), ranks=[0, 1]) == 3
            assert lookup(store, range(8), ranks=[1]) == 3
            assert lookup(store, range(8), ranks=[0, 1, 2]) == 0
            assert lookup(store, range(8), group=1) == 1
            assert lookup(store, range(4, 8)) == 1
            assert lookup(store, [7, 0]) == 0
            assert lookup(store, []) == 0
            metrics = store.metrics()
            assert metrics["lookups"] == 8
            assert metrics["chunks_found"] == 5 + 3 + 3 + 0 + 1 + 1 + 0 + 0


def test_another_namespace_sees_nothing(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    with open_store(tmp_path, model="one") as store:
        store_chunks(memory.attach(store), {0: range(4)})
        assert lookup(store, [0]) == 1
    with open_store(tmp_path, model="two") as store:
        assert lookup(store, [0]) == 0
        report = load_chunks(memory.attach(store), {0: range(4)})
        assert (report.loaded, report.failed) == (0, [0])


def test_several_directories_share_the_chunks(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    joined = ",".join(map(str, paths))
    memory = HostMemory(Geometry(), seed=1)
    with open_store(joined) as store:
        # Chunk 0 to 31 hold the same bytes under keys of their own.
        store_chunks(memory.attach(store), {index: range(4) for index in range(32)})
        assert [report["path"] for report in store.describe()] == [str(path) for path in paths]
    counts = [len(list(path.rglob("*.safetensors"))) for path in paths]
    assert sum(counts) == 32 and all(counts), counts
    target = HostMemory(Geometry(), seed=2)
    with open_store(joined) as store:
        assert lookup(store, range(32)) == 32
        assert load_chunks(target.attach(store), {17: range(4, 8)}).loaded == 1
    assert target.blocks(range(4, 8)) == memory.blocks(range(4))
