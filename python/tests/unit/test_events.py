"""KV events: what is announced when, and what is taken back."""

from __future__ import annotations

import msgspec
import pytest
from fakes import (
    BLOCK,
    CHUNK,
    PER_CHUNK,
    FakeBlocks,
    FakeLookup,
    keys_of,
    make_request,
    step,
    watch,
)
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvrail.vllm import events as module
from kvrail.vllm.events import StorageEvents
from kvrail.vllm.geometry import ChunkGeometry, GroupGeometry
from kvrail.vllm.metadata import KvrailWorkerMetadata
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions

GEOMETRY = ChunkGeometry(CHUNK, BLOCK, BLOCK)
WINDOW = GroupGeometry(1, BLOCK, CHUNK, look_back=20)
TWO_GROUPS = ChunkGeometry(CHUNK, BLOCK, BLOCK, (GroupGeometry(0, BLOCK, CHUNK), WINDOW))


def published(*places: tuple[int, bytes], ranks: int = 1) -> KvrailWorkerMetadata:
    return KvrailWorkerMetadata(stored=dict.fromkeys(places, ranks))


def made(lookup: FakeLookup, ranks: int = 1) -> tuple[ConnectorScheduler, StorageEvents]:
    events = StorageEvents(GEOMETRY, [ranks])
    scheduler = ConnectorScheduler(GEOMETRY, SchedulerOptions(), watch())
    scheduler.enable(lookup, events=events)
    return scheduler, events


def external(request) -> list:
    """The request's block hashes as events have them."""
    return [maybe_convert_block_hash(block) for block in request.block_hashes]


def compute(scheduler: ConnectorScheduler, request) -> None:
    """Runs the whole prompt in one step."""
    scheduler.on_new_request(request)
    output = step(new=[(request, 0, request.num_tokens)], blocks={request.request_id: range(19)})
    scheduler.build_connector_meta(output)


def test_a_chunk_is_announced_when_it_is_published_and_not_before():
    request = make_request("a", 150)
    first, second = keys_of(request, 2)
    scheduler, events = made(FakeLookup())
    compute(scheduler, request)
    assert events.take() == []
    scheduler.update_connector_output(published((0, first)))
    (event,) = events.take()
    assert isinstance(event, BlockStored)
    hashes = external(request)
    assert (event.block_hashes, event.parent_block_hash) == (hashes[:PER_CHUNK], None)
    assert event.token_ids == list(range(CHUNK))
    assert (event.block_size, event.medium, event.group_idx) == (BLOCK, "STORAGE", 0)
    scheduler.update_connector_output(published((0, second)))
    (event,) = events.take()
    assert event.block_hashes == hashes[PER_CHUNK : 2 * PER_CHUNK]
    assert event.parent_block_hash == hashes[PER_CHUNK - 1]
    assert events.take() == []
    msgspec.msgpack.encode(event)


def test_all_ranks_must_have_it():
    request = make_request("a", 100)
    (key,) = keys_of(request, 1)
    scheduler, events = made(FakeLookup(), ranks=2)
    compute(scheduler, request)
    scheduler.update_connector_output(published((0, key)))
    assert events.take() == []
    scheduler.update_connector_output(published((0, key)))
    assert len(events.take()) == 1


def test_a_chunk_is_announced_once():
    one, two = make_request("a", 100), make_request("b", 100)
    (key,) = keys_of(one, 1)
    lookup = FakeLookup()
    scheduler, events = made(lookup)
    for request in (one, two):
        compute(scheduler, request)
        scheduler.update_connector_output(published((0, key)))
        lookup.present = {key}
    assert len(events.take()) == 1


def test_what_the_next_lookup_does_not_find_is_taken_back():
    request = make_request("a", 150)
    first, second = keys_of(request, 2)
    lookup = FakeLookup()
    scheduler, events = made(lookup)
    compute(scheduler, request)
    scheduler.update_connector_output(published((0, first), (0, second)))
    events.take()
    lookup.present = {first}
    later = make_request("b", 150)
    assert scheduler.get_num_new_matched_tokens(later, 0) == (CHUNK, True)
    (event,) = events.take()
    assert isinstance(event, BlockRemoved)
    assert event.block_hashes == external(request)[PER_CHUNK : 2 * PER_CHUNK]
    assert (event.medium, event.group_idx) == ("STORAGE", 0)
    assert scheduler.get_num_new_matched_tokens(make_request("c", 150), 0) == (CHUNK, True)
    assert events.take() == [], "it was taken back once"


def test_what_fails_to_load_is_taken_back_and_may_be_announced_again():
    request = make_request("a", 150)
    first, second = keys_of(request, 2)
    scheduler, events = made(FakeLookup([first, second]))
    events.plan(request, 0, 1, second)
    events.stored({(0, second): 1})
    events.take()
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(9)), tokens)
    scheduler.build_connector_meta(step())
    scheduler.update_connector_output(KvrailWorkerMetadata({"a": (second,)}), {"a"})
    (event,) = events.take()
    assert isinstance(event, BlockRemoved)
    output = step(new=[(request, CHUNK, 150 - CHUNK)], blocks={"a": range(10)})
    scheduler.build_connector_meta(output)
    scheduler.update_connector_output(published((0, second)))
    (event,) = events.take()
    assert isinstance(event, BlockStored)


def test_of_a_window_the_blocks_in_the_file_are_announced():
    request = make_request("a", 150)
    key = keys_of(request, 2)[1]
    events = StorageEvents(TWO_GROUPS, [1, 1])
    events.plan(request, 1, 1, key)
    events.stored({(1, key): 1})
    (event,) = events.take()
    hashes = external(request)
    assert (event.block_hashes, event.parent_block_hash) == (hashes[6:8], hashes[5])
    assert (event.token_ids, event.group_idx) == (list(range(96, 128)), 1)
    events.lost(request, 1, key)
    (event,) = events.take()
    assert event.block_hashes == hashes[6:8]


def test_blocks_longer_than_a_hash_have_the_hash_of_their_end():
    request = make_request("a", 150)
    key = keys_of(request, 1)[0]
    whole = GroupGeometry(0, 2 * BLOCK, CHUNK)
    events = StorageEvents(ChunkGeometry(CHUNK, 2 * BLOCK, BLOCK, (whole,)), [1])
    events.plan(request, 0, 0, key)
    events.stored({(0, key): 1})
    (event,) = events.take()
    hashes = external(request)
    assert (event.block_hashes, event.block_size) == ([hashes[1], hashes[3]], 2 * BLOCK)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PLANNED", 2)
    monkeypatch.setattr(module, "MAX_ANNOUNCED", 1)
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    events = StorageEvents(GEOMETRY, [1])
    for index, key in enumerate(keys):
        events.plan(request, 0, index, key)
    events.stored({(0, key): 1 for key in keys})
    assert len(events.take()) == 2, "of the first two nothing is known any more"
    for index, key in enumerate(keys):
        events.lost(request, index, key)
    assert len(events.take()) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_counts_of_workers_are_added(count):
    one = published((0, b"k"), (1, b"k"))
    other = published((0, b"k"), ranks=count)
    assert one.aggregate(other).stored == {(0, b"k"): 1 + count, (1, b"k"): 1}
