"""The scheduler side with LMCache's hashes for chunk keys."""

from __future__ import annotations

import pytest
from fakes import BLOCK, CHUNK, GEOMETRY, FakeLookup, make_request, step, watch

from kvrail.vllm.lmcache_hash import LmcacheHasher
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions

START = 7


def keys_of(tokens: int) -> list[bytes]:
    """LMCache's hashes of the tokens that `make_request` gives, made by Python's own hash."""
    found, before = [], START
    for begin in range(0, tokens - CHUNK + 1, CHUNK):
        before = hash((before, tuple(range(begin, begin + CHUNK)), ()))
        found.append((before % 2**64).to_bytes(8, "big"))
    return found


@pytest.fixture
def scheduler() -> ConnectorScheduler:
    return ConnectorScheduler(
        GEOMETRY,
        SchedulerOptions(min_load_tokens=0),
        watch(),
        hasher=LmcacheHasher("builtin", START),
    )


def test_chunks_are_asked_for_stored_and_loaded_by_lmcaches_names(
    scheduler: ConnectorScheduler,
) -> None:
    request = make_request("a", 4 * CHUNK + 5)
    keys = keys_of(4 * CHUNK)
    lookup = FakeLookup(keys[:2])
    scheduler.enable(lookup)
    scheduler.on_new_request(request)
    assert lookup.tickets[0].keys == keys
    assert scheduler.get_num_new_matched_tokens(request, 0) == (2 * CHUNK, True)
    blocks = {"a": range(len(keys) * CHUNK // BLOCK + 1)}
    output = step(new=[(request, 2 * CHUNK, 2 * CHUNK + 5)], blocks=blocks)
    (part,) = scheduler.build_connector_meta(output).stores
    assert [chunk.key for chunk in part.chunks] == keys[2:]
    assert [chunk.parent for chunk in part.chunks] == [None, None]


def test_requests_that_tokens_do_not_identify_are_left_alone(
    scheduler: ConnectorScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    lookup = FakeLookup([])
    scheduler.enable(lookup)
    for name in ("a", "b"):
        request = make_request(name, 4 * CHUNK, salt="blue")
        scheduler.on_new_request(request)
        assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets == []
    messages = [record.message for record in caplog.records if "cache_salt" in record.message]
    assert len(messages) == 1, "said once"
