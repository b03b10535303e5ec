"""The worker side: what reaches the KV cache, and what vLLM is told afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fakes import FakeKvCache, FakeStore

from kvrail._core import ClosedError
from kvrail.vllm import worker as module
from kvrail.vllm.metadata import (
    NO_WORK,
    NO_WORK_NO_FORWARD,
    KvrailMetadata,
    KvrailWorkerMetadata,
    LoadChunk,
    RequestLoad,
    StoreChunk,
)
from kvrail.vllm.worker import ConnectorWorker

LOAD = RequestLoad(
    "a",
    (
        LoadChunk(b"k0" * 16, None, 2, (12, 13)),
        LoadChunk(b"k1" * 16, b"k0" * 16, 0, (14, 15, 16, 17)),
    ),
)


def report(failed=(), errors=()):
    return SimpleNamespace(loaded=2 - len(failed), failed=list(failed), errors=list(errors))


@pytest.fixture
def kv_cache() -> FakeKvCache:
    return FakeKvCache()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def worker(store, kv_cache) -> ConnectorWorker:
    made = ConnectorWorker()
    made.adopt(store, kv_cache)
    return made


def test_a_load_is_reported_when_it_is_done_and_not_before(worker, kv_cache):
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    assert kv_cache.loads == [list(LOAD.chunks)]
    assert worker.take_finished_loads(NO_WORK) == set()
    kv_cache.tickets[0].report = report()
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_finished_loads(NO_WORK) == set()
    assert worker.take_failed_blocks() == set()
    assert worker.take_worker_metadata() is None


def test_on_a_gpu_transfers_are_ordered_with_the_stream_that_computes(store, kv_cache, monkeypatch):
    streams = {"cuda:1": 77}
    monkeypatch.setattr(module, "_current_stream", streams.__getitem__)
    worker = ConnectorWorker()
    worker.adopt(store, kv_cache, "cuda:1")
    chunk = StoreChunk(b"k0" * 16, None, (1, 2))
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    worker.submit_stores(KvrailMetadata(stores=(chunk,)))
    assert (kv_cache.loads, kv_cache.stores) == ([list(LOAD.chunks)], [[chunk]])
    assert kv_cache.streams == [77, 77]


def test_a_failed_chunk_is_reported_by_block_in_the_same_step(worker, kv_cache):
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    kv_cache.tickets[0].report = report(failed=[0], errors=["damaged"])
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_failed_blocks() == {12, 13}, "only the blocks that were to be loaded"
    assert worker.take_worker_metadata() == KvrailWorkerMetadata({"a": (LOAD.chunks[0].key,)})
    assert worker.take_failed_blocks() == set()
    assert worker.take_worker_metadata() is None


@pytest.mark.parametrize("when", ["submit", "poll", "wait"])
def test_a_store_that_fails_fails_all_blocks(worker, kv_cache, when):
    if when == "submit":
        kv_cache.error = ClosedError("closed")
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    if when != "submit":
        kv_cache.tickets[0].error = ClosedError("closed")
    step = NO_WORK_NO_FORWARD if when == "wait" else NO_WORK
    assert worker.take_finished_loads(step) == {"a"}
    assert worker.take_failed_blocks() == {12, 13, 14, 15, 16, 17}


def test_a_worker_without_a_store_ends_every_load(kv_cache):
    worker = ConnectorWorker()
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_failed_blocks() == {12, 13, 14, 15, 16, 17}


def test_only_a_step_without_forward_waits(worker, kv_cache):
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    worker.take_finished_loads(NO_WORK)
    assert kv_cache.tickets[0].waits == []
    assert worker.take_finished_loads(NO_WORK_NO_FORWARD) == set()
    assert kv_cache.tickets[0].waits == [module.IDLE_WAIT_SECONDS]
    kv_cache.tickets[0].report = report()
    assert worker.take_finished_loads(NO_WORK_NO_FORWARD) == {"a"}
    assert len(kv_cache.tickets[0].waits) == 1


def test_stores_of_a_step_go_in_one_call(worker, kv_cache):
    chunks = (StoreChunk(b"a" * 32, None, (1, 2)), StoreChunk(b"b" * 32, b"a" * 32, (3, 4)))
    worker.submit_stores(KvrailMetadata(stores=chunks))
    worker.submit_stores(NO_WORK)
    assert kv_cache.stores == [list(chunks)]


def test_a_store_that_refuses_does_not_disturb_the_step(worker, kv_cache, monkeypatch):
    lines = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *rest: lines.append(text % rest))
    kv_cache.error = ClosedError("closed")
    for _ in range(2):
        worker.submit_stores(KvrailMetadata(stores=(StoreChunk(b"a" * 32, None, (1, 2)),)))
    assert lines == ["kvrail: store: closed"], "one line for all of one kind"


def test_a_replica_loads_but_does_not_store(worker, kv_cache):
    worker._stores_here = False
    worker.submit_stores(KvrailMetadata(stores=(StoreChunk(b"a" * 32, None, (1, 2)),)))
    assert kv_cache.stores == []


def test_failures_of_two_ranks_are_merged():
    one = KvrailWorkerMetadata({"a": (b"1", b"2")})
    other = KvrailWorkerMetadata({"a": (b"2", b"3"), "b": (b"4",)})
    assert one.aggregate(other) == KvrailWorkerMetadata({"a": (b"1", b"2", b"3"), "b": (b"4",)})


def test_stats_are_increments_and_notices_are_taken(worker, store):
    store.totals["chunks_stored"] = 3.0
    store.notices.append(("warning", "the disk is full"))
    first = worker.take_stats()
    assert first is not None
    assert first.data == {"chunks_stored": 3.0}
    assert store.notices == []
    store.totals["chunks_stored"] = 5.0
    assert worker.take_stats() is None, "not due yet"
    worker.submit_stores(KvrailMetadata(stores=(StoreChunk(b"a" * 32, None, (1,)),)))
    second = worker.take_stats()
    assert second is not None
    assert second.data == {"chunks_stored": 2.0}


def test_shutdown_closes_once_within_a_limit(worker, store):
    worker.shutdown()
    worker.shutdown()
    assert store.closed == [module.CLOSE_LIMIT_SECONDS]
    assert worker.take_stats() is None
