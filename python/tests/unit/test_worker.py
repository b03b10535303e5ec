"""The worker side: what reaches the KV cache, and what vLLM is told afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fakes import FakeKvCache, FakeStore

from kvrail._core import ClosedError
from kvrail.vllm import worker as module
from kvrail.vllm.loaded_weights import WeightsReport
from kvrail.vllm.metadata import (
    NO_WORK,
    NO_WORK_MAY_WAIT,
    GroupLoad,
    GroupStore,
    KvrailHandshake,
    KvrailMetadata,
    KvrailWorkerMetadata,
    LoadChunk,
    RequestLoad,
    StoreChunk,
)
from kvrail.vllm.worker import ConnectorWorker

CHUNKS = (
    LoadChunk(b"k0" * 16, None, 2, (12, 13)),
    LoadChunk(b"k1" * 16, b"k0" * 16, 0, (14, 15, 16, 17)),
)
WINDOW = (LoadChunk(b"k1" * 16, b"k0" * 16, 1, (21,)),)
LOAD = RequestLoad("a", (GroupLoad(0, CHUNKS),))
LOAD_OF_TWO = RequestLoad("a", (GroupLoad(0, CHUNKS), GroupLoad(1, WINDOW)))


def storing(*chunks: StoreChunk) -> KvrailMetadata:
    return KvrailMetadata(stores=(GroupStore(0, chunks),))


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
    made.adopt(store, [kv_cache])
    return made


def test_a_load_is_reported_when_it_is_done_and_not_before(worker, kv_cache):
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    assert kv_cache.loads == [list(CHUNKS)]
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
    worker.adopt(store, [kv_cache], "cuda:1")
    chunk = StoreChunk(b"k0" * 16, None, (1, 2))
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    worker.submit_stores(storing(chunk))
    assert (kv_cache.loads, kv_cache.stores) == ([list(CHUNKS)], [[chunk]])
    assert kv_cache.streams == [77, 77]


def test_a_failed_chunk_is_reported_by_block_in_the_same_step(worker, kv_cache):
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    kv_cache.tickets[0].report = report(failed=[0], errors=["damaged"])
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_failed_blocks() == {12, 13}, "only the blocks that were to be loaded"
    assert worker.take_worker_metadata() == KvrailWorkerMetadata({"a": (CHUNKS[0].key,)})
    assert worker.take_failed_blocks() == set()
    assert worker.take_worker_metadata() is None


@pytest.mark.parametrize("when", ["submit", "poll", "wait"])
def test_a_store_that_fails_fails_all_blocks(worker, kv_cache, when):
    if when == "submit":
        kv_cache.error = ClosedError("closed")
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    if when != "submit":
        kv_cache.tickets[0].error = ClosedError("closed")
    step = NO_WORK_MAY_WAIT if when == "wait" else NO_WORK
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
    assert worker.take_finished_loads(NO_WORK_MAY_WAIT) == set()
    assert kv_cache.tickets[0].waits == [module.IDLE_WAIT_SECONDS]
    kv_cache.tickets[0].report = report()
    assert worker.take_finished_loads(NO_WORK_MAY_WAIT) == {"a"}
    assert len(kv_cache.tickets[0].waits) == 1


def test_stores_of_a_step_go_in_one_call(worker, kv_cache):
    chunks = (StoreChunk(b"a" * 32, None, (1, 2)), StoreChunk(b"b" * 32, b"a" * 32, (3, 4)))
    worker.submit_stores(storing(*chunks))
    worker.submit_stores(NO_WORK)
    assert kv_cache.stores == [list(chunks)]


def test_a_store_that_refuses_does_not_disturb_the_step(worker, kv_cache, monkeypatch):
    lines = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *rest: lines.append(text % rest))
    kv_cache.error = ClosedError("closed")
    for _ in range(2):
        worker.submit_stores(storing(StoreChunk(b"a" * 32, None, (1, 2))))
    assert lines == ["kvrail: store: closed"], "one line for all of one kind"


def test_a_replica_loads_but_does_not_store(worker, kv_cache):
    worker._stored_groups = set()
    worker.submit_stores(storing(StoreChunk(b"a" * 32, None, (1, 2))))
    assert kv_cache.stores == []


def test_failures_of_two_ranks_are_merged():
    one = KvrailWorkerMetadata({"a": (b"1", b"2")})
    other = KvrailWorkerMetadata({"a": (b"2", b"3"), "b": (b"4",)})
    assert one.aggregate(other) == KvrailWorkerMetadata({"a": (b"1", b"2", b"3"), "b": (b"4",)})


def test_chunks_that_were_published_are_reported_in_order(worker, kv_cache, monkeypatch):
    """Not those that were there, or believed to be there, and none before it is done."""
    worker._announces = True
    reports = [None, None, None]
    tickets = iter([SimpleNamespace(poll=lambda i=i: reports[i]) for i in range(3)])
    monkeypatch.setattr(kv_cache, "store", lambda chunks, **_: next(tickets))
    worker.submit_stores(storing(*(StoreChunk(bytes([i]) * 32, None, (i,)) for i in range(3))))
    assert worker.take_worker_metadata() is None
    reports[1] = SimpleNamespace(stored=1)
    assert worker.take_worker_metadata() is None, "the first is not done"
    reports[0] = SimpleNamespace(stored=0)
    assert worker.take_worker_metadata() == KvrailWorkerMetadata(stored={(0, b"\1" * 32): 1})
    reports[2] = SimpleNamespace(stored=1)
    assert worker.take_worker_metadata() == KvrailWorkerMetadata(stored={(0, b"\2" * 32): 1})
    assert worker.take_worker_metadata() is None


@pytest.fixture
def two_groups(store) -> tuple[ConnectorWorker, FakeKvCache, FakeKvCache]:
    made, first, second = ConnectorWorker(), FakeKvCache(), FakeKvCache()
    made.adopt(store, [first, second], fails_by_block=False)
    return made, first, second


def test_a_chunk_of_all_groups_is_stored_before_the_next_one(two_groups, monkeypatch):
    """When memory for stores runs out, what is left are chunks that can be loaded."""
    worker, first, second = two_groups
    order = []
    for group, kv_cache in enumerate((first, second)):
        monkeypatch.setattr(
            kv_cache, "store", lambda chunks, group=group, **_: order.append((group, *chunks))
        )
    chunks = [StoreChunk(bytes([i]) * 32, None, (i,)) for i in range(4)]
    # The first group has a window, and needs the last two chunks only.
    parts = (GroupStore(0, tuple(chunks[2:])), GroupStore(1, tuple(chunks)))
    worker.submit_stores(KvrailMetadata(stores=parts))
    assert order == [
        (1, chunks[0]),
        (1, chunks[1]),
        (1, chunks[2]),
        (0, chunks[2]),
        (1, chunks[3]),
        (0, chunks[3]),
    ]


def test_a_load_of_two_groups_ends_with_the_last_of_them(two_groups):
    worker, first, second = two_groups
    worker.start_loads(KvrailMetadata(loads=(LOAD_OF_TWO,)))
    assert (first.loads, second.loads) == ([list(CHUNKS)], [list(WINDOW)])
    second.tickets[0].report = report()
    assert worker.take_finished_loads(NO_WORK_MAY_WAIT) == set()
    assert first.tickets[0].waits and not second.tickets[0].waits
    first.tickets[0].report = report()
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_failed_requests() == worker.take_failed_blocks() == set()


@pytest.mark.parametrize("group", [0, 1])
def test_with_two_groups_a_request_fails_as_a_whole(two_groups, group):
    """vLLM stops with an error when it is told block ids of a model with several groups."""
    worker, *caches = two_groups
    worker.start_loads(KvrailMetadata(loads=(LOAD_OF_TWO,)))
    for place, cache in enumerate(caches):
        bad = place == group
        cache.tickets[0].report = report([0], ["damaged"]) if bad else report()
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert worker.take_failed_blocks() == set()
    assert worker.take_failed_requests() == {"a"}
    key = (CHUNKS if group == 0 else WINDOW)[0].key
    assert worker.take_worker_metadata() == KvrailWorkerMetadata({"a": (key,)})
    assert worker.take_failed_requests() == set()


@pytest.mark.parametrize("when", ["submit", "poll", "wait"])
def test_a_group_that_cannot_be_loaded_does_not_end_the_load_of_another(two_groups, when):
    """The other may still write to the blocks, so the request must not have them yet."""
    worker, first, second = two_groups
    if when == "submit":
        second.error = ClosedError("closed")
    worker.start_loads(KvrailMetadata(loads=(LOAD_OF_TWO,)))
    if when != "submit":
        second.tickets[0].error = ClosedError("closed")
    step = NO_WORK_MAY_WAIT if when == "wait" else NO_WORK
    assert worker.take_finished_loads(step) == set()
    first.tickets[0].report = report()
    assert worker.take_finished_loads(step) == {"a"}
    assert worker.take_failed_requests() == {"a"}
    assert worker.take_failed_blocks() == set()


def test_with_a_window_a_request_fails_as_a_whole(store, kv_cache):
    """What lies before the window was not loaded, so vLLM must not go on from a failed block."""
    worker = ConnectorWorker()
    worker.adopt(store, [kv_cache], fails_by_block=False)
    worker.start_loads(KvrailMetadata(loads=(LOAD,)))
    kv_cache.tickets[0].report = report([1], ["damaged"])
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert (worker.take_failed_blocks(), worker.take_failed_requests()) == (set(), {"a"})


def test_after_its_end_a_worker_of_two_groups_fails_requests_and_no_blocks(two_groups):
    worker, _, _ = two_groups
    worker.shutdown()
    worker.start_loads(KvrailMetadata(loads=(LOAD_OF_TWO,)))
    assert worker.take_finished_loads(NO_WORK) == {"a"}
    assert (worker.take_failed_blocks(), worker.take_failed_requests()) == (set(), {"a"})


def test_stats_are_increments_and_notices_are_taken(worker, store):
    store.totals["chunks_stored"] = 3.0
    store.notices.append(("warning", "the disk is full"))
    first = worker.take_stats()
    assert first is not None
    assert first.data == {"chunks_stored": 3.0}
    assert store.notices == []
    store.totals["chunks_stored"] = 5.0
    assert worker.take_stats() is None, "not due yet"
    worker.submit_stores(storing(StoreChunk(b"a" * 32, None, (1,))))
    second = worker.take_stats()
    assert second is not None
    assert second.data == {"chunks_stored": 2.0}


def test_shutdown_closes_once_within_a_limit(worker, store):
    worker.shutdown()
    worker.shutdown()
    assert store.closed == [module.CLOSE_LIMIT_SECONDS]
    assert worker.take_stats() is None


def test_a_question_for_the_weights_is_answered_with_its_number_and_the_rank(store, kv_cache):
    reports = [WeightsReport("a" * 64, is_as_loaded=True)]
    made = ConnectorWorker(weights=SimpleNamespace(report=lambda: reports[0]))
    made.adopt(store, [kv_cache])
    made.start_loads(KvrailMetadata(weights_question=5))
    assert made.take_worker_metadata() == KvrailWorkerMetadata(weights={(5, 0): reports[0]})
    assert made.take_worker_metadata() is None
    made.start_loads(NO_WORK)
    assert made.take_worker_metadata() is None


def test_without_a_way_to_the_weights_the_answer_is_why(worker):
    worker.start_loads(KvrailMetadata(weights_question=1))
    answers = worker.take_worker_metadata().weights
    assert answers[1, 0].problem == "no way to the weights in memory"


def test_a_handshake_goes_out_once_with_what_else_there_is(store, kv_cache):
    made = ConnectorWorker(sends_handshake=True)
    made.adopt(store, [kv_cache])
    shake = KvrailHandshake("m", "{}", (0,), 1)
    made._unsent = {(0, 1): shake}
    assert made.take_worker_metadata() == KvrailWorkerMetadata(handshakes={(0, 1): shake})
    assert made.take_worker_metadata() is None
    other = KvrailWorkerMetadata(handshakes={(0, 0): shake})
    merged = other.aggregate(KvrailWorkerMetadata(handshakes={(0, 1): shake}))
    assert merged.handshakes == {(0, 0): shake, (0, 1): shake}
