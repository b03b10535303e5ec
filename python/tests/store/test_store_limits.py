"""What is bounded: staging memory, the queue, waits; and what goes on at the bound."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from store_harness import (
    LIMIT_SECONDS,
    Geometry,
    HostMemory,
    config,
    key,
    load_chunks,
    lookup,
    namespace,
    open_store,
    parent,
    store_chunks,
)

from kvrail._core import ConfigError, KvCache, Store, WaitTimeoutError

# A chunk file of a little under 1 MiB: a staging memory of 1 MiB holds one.
LARGE = Geometry(layer_bytes=(65536, 65536, 65536), block_count=8)


def test_stores_beyond_the_staging_memory_are_dropped_and_counted(tmp_path: Path) -> None:
    memory = HostMemory(LARGE, seed=1)
    with open_store(tmp_path, cufile_buffer_size=1) as store:
        kv_cache = memory.attach(store)
        assert 2**19 < kv_cache.chunk_file_bytes <= 2**20
        # The one buffer is taken by the first chunk, and writing it takes longer than refusing one.
        report = store_chunks(kv_cache, {index: range(4) for index in range(50)})
        assert report.dropped > 0
        assert (report.stored + report.dropped, report.failed) == (50, 0)
        metrics = store.metrics()
        assert metrics["stores_dropped_no_buffer"] == report.dropped
        assert metrics["chunks_stored"] == report.stored
        stored = [index for index in range(50) if lookup(store, [index])]
        assert len(stored) == report.stored
        # What was dropped is stored when there is room.
        dropped = next(index for index in range(50) if index not in stored)
        assert store_chunks(kv_cache, {dropped: range(4)}).stored == 1


def test_a_prompt_ten_times_larger_than_the_staging_memory_loads(tmp_path: Path) -> None:
    geometry = Geometry(layer_bytes=(16384, 16384), block_count=4 * 96)
    chunks = {index: list(range(index * 4, index * 4 + 4)) for index in range(96)}
    source, target = HostMemory(geometry, seed=1), HostMemory(geometry, seed=2)
    with open_store(tmp_path, cufile_buffer_size=64) as store:
        assert store_chunks(source.attach(store), chunks).stored == 96
    with open_store(tmp_path, cufile_buffer_size=1) as store:
        kv_cache = target.attach(store)
        assert len(chunks) * kv_cache.payload_bytes >= 10 * 2**20
        report = load_chunks(kv_cache, chunks)
        assert (report.loaded, report.failed) == (96, [])
    assert np.array_equal(source.arrays[0], target.arrays[0])


def test_a_staging_memory_smaller_than_one_chunk_is_refused(tmp_path: Path) -> None:
    geometry = Geometry(layer_bytes=(2**19,), block_count=4)
    with (
        open_store(tmp_path, cufile_buffer_size=1, chunk_size=64) as store,
        pytest.raises(ConfigError, match=r"`cufile_buffer_size` = 1: expected at least 3 .*64 tok"),
    ):
        HostMemory(geometry, seed=1).attach(store)


def _chunks_that_take_a_while(path: Path) -> tuple[Store, HostMemory, dict[int, list[int]]]:
    """A store with 64 MiB of chunks and one I/O thread; reading them takes milliseconds."""
    geometry = Geometry(layer_bytes=(2**18,), block_count=256)
    chunks = {index: list(range(index * 4, index * 4 + 4)) for index in range(64)}
    memory = HostMemory(geometry, seed=1)
    settings = {"cufile_buffer_size": 128, "extra_config": {"disk_io_threads": 1}}
    store = Store(config(path, **settings), namespace())
    kv_cache = memory.attach(store)
    pending = chunks
    while pending:
        store_chunks(kv_cache, pending)
        pending = {index: blocks for index, blocks in pending.items() if not lookup(store, [index])}
    return store, memory, chunks


def test_other_threads_run_while_one_waits(tmp_path: Path) -> None:
    store, memory, chunks = _chunks_that_take_a_while(tmp_path)
    interval = sys.getswitchinterval()
    try:
        kv_cache = memory.attach(store)
        items = [(key(index), parent(index), 0, blocks) for index, blocks in chunks.items()]
        # With an interval this long only a thread that gives the GIL up lets another one run.
        sys.setswitchinterval(LIMIT_SECONDS)
        # A load may be done before the wait begins, which then shows nothing.
        assert any(_counts_during_a_wait(kv_cache, items) for _ in range(20))
    finally:
        sys.setswitchinterval(interval)
        store.close(LIMIT_SECONDS)


def _counts_during_a_wait(
    kv_cache: KvCache, items: list[tuple[bytes, bytes | None, int, list[int]]]
) -> bool:
    """Whether a thread that is let go right before a wait has counted to the end after it."""
    counted = 0
    go = threading.Event()

    def count() -> None:
        nonlocal counted
        go.wait()
        for _ in range(1000):
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    ticket = kv_cache.load(items)
    go.set()
    report = ticket.wait(LIMIT_SECONDS)
    counted_during_wait = counted
    thread.join()
    assert report.loaded == len(items)
    return counted_during_wait == 1000


def test_a_wait_is_bounded_and_the_ticket_stays_good(tmp_path: Path) -> None:
    store, memory, chunks = _chunks_that_take_a_while(tmp_path)
    try:
        kv_cache = memory.attach(store)
        items = [(key(index), parent(index), 0, blocks) for index, blocks in chunks.items()]
        ticket = kv_cache.load(items)
        with pytest.raises(WaitTimeoutError, match="not done within"):
            ticket.wait(0)
        assert isinstance(WaitTimeoutError("x"), TimeoutError)
        report = ticket.wait(LIMIT_SECONDS)
        assert report.loaded == len(chunks)
        polled = ticket.poll()
        assert polled is not None and polled.loaded == len(chunks)
        for seconds in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="limit_seconds"):
                ticket.wait(seconds)
    finally:
        store.close(LIMIT_SECONDS)


def test_tickets_may_be_dropped_while_the_work_goes_on(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    expected = memory.blocks(range(4))
    with open_store(tmp_path) as store:
        kv_cache = memory.attach(store)
        kv_cache.store([(key(0), None, [0, 1, 2, 3])])
        store.flush(LIMIT_SECONDS)
        assert lookup(store, [0]) == 1
        for block in range(4, 32, 4):
            kv_cache.load([(key(0), None, 0, list(range(block, block + 4)))])
        del kv_cache
        gc.collect()
        deadline = time.monotonic() + LIMIT_SECONDS
        while store.metrics()["chunks_loaded"] < 7 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert all(memory.blocks(range(block, block + 4)) == expected for block in range(4, 32, 4))


class Owner:
    """Holds memory and can be watched."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory


def test_the_owner_lives_as_long_as_its_attachment(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    owner = Owner(memory)
    watched = weakref.ref(owner)
    with open_store(tmp_path) as store:
        kv_cache = store.attach(
            memory.layers, memory.spans(), owner, block_count=32, blocks_per_chunk=4
        )
        del owner
        gc.collect()
        assert watched() is not None
        assert store_chunks(kv_cache, {0: range(4)}).stored == 1
        del kv_cache
        deadline = time.monotonic() + LIMIT_SECONDS
        while watched() is not None and time.monotonic() < deadline:
            time.sleep(0.005)
            # A thread of the store may be the last holder; it cannot let go of a Python object
            # itself, the next call of any method does that.
            store.metrics()
        assert watched() is None


def test_a_closed_store_fails_and_does_not_hang(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    with open_store(tmp_path) as store:
        kv_cache = memory.attach(store)
        store_chunks(kv_cache, {0: range(4)})
        store.close(LIMIT_SECONDS)
        store.close(LIMIT_SECONDS)
        report = store_chunks(kv_cache, {1: range(4)})
        assert (report.stored, report.failed) == (0, 1)
        loaded = load_chunks(kv_cache, {0: range(4)})
        assert (loaded.loaded, loaded.failed) == (0, [0])
