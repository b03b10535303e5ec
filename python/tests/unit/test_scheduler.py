"""The scheduler side: what is looked up, promised, loaded and stored for real requests of vLLM."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from fakes import (
    BLOCK,
    CHUNK,
    PER_CHUNK,
    FakeBlocks,
    FakeLookup,
    keys_of,
    make,
    make_request,
    step,
    watch,
)

from kvrail._core import ClosedError
from kvrail.vllm import bad_keys
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.metadata import (
    NO_WORK,
    NO_WORK_MAY_WAIT,
    KvrailMetadata,
    KvrailWorkerMetadata,
)
from kvrail.vllm.request_lookups import ANSWER_SECONDS, IDLE_WAIT_SECONDS, MAX_EARLY_LOOKUPS
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions


def stored_keys(metadata: KvrailMetadata) -> list[bytes]:
    return [chunk.key for chunk in stored_chunks(metadata)]


def stored_chunks(metadata: KvrailMetadata) -> tuple:
    return tuple(chunk for part in metadata.stores for chunk in part.chunks)


def test_nothing_happens_before_the_workers_agree(clock):
    scheduler = make(None, clock)
    request = make_request("a", 300)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output) is NO_WORK


def test_an_answer_that_is_not_there_yet_is_none(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 2), answering=False)
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    lookup.settle(lookup.tickets[0])
    assert scheduler.get_num_new_matched_tokens(request, 0) == (2 * CHUNK, True)
    assert len(lookup.tickets) == 1, "one lookup answers all questions"


@pytest.mark.parametrize(
    ("tokens", "present", "local", "expected"),
    [
        (300, 4, 0, 4 * CHUNK),
        (4 * CHUNK, 4, 0, 3 * CHUNK),
        (4 * CHUNK + 1, 4, 0, 4 * CHUNK),
        (300, 4, 5 * BLOCK, 4 * CHUNK - 5 * BLOCK),
        (300, 2, 2 * CHUNK, 0),
        (300, 0, 0, 0),
        (300, 2, 3 * CHUNK, 0),
    ],
)
def test_matched_tokens(clock, tokens, present, local, expected):
    request = make_request("a", tokens)
    scheduler = make(FakeLookup(keys_of(request, present)), clock)
    assert scheduler.get_num_new_matched_tokens(request, local) == (expected, expected > 0)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK])
def test_a_prompt_without_a_loadable_chunk_is_not_looked_up(clock, tokens):
    lookup = FakeLookup()
    scheduler = make(lookup, clock)
    request = make_request("a", tokens)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets == []


def test_a_prompt_that_vllm_has_itself_needs_no_lookup(clock):
    lookup = FakeLookup()
    scheduler = make(lookup, clock)
    request = make_request("a", 4 * CHUNK)
    assert scheduler.get_num_new_matched_tokens(request, 3 * CHUNK + BLOCK) == (0, False)
    assert lookup.tickets == []


def test_the_load_starts_inside_a_chunk_that_vllm_has_in_part(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys[:3]), clock)
    local = CHUNK + 2 * BLOCK
    tokens, _ = scheduler.get_num_new_matched_tokens(request, local)
    blocks = list(range(100, 119))
    scheduler.update_state_after_alloc(request, FakeBlocks(blocks), tokens)
    metadata = scheduler.build_connector_meta(step())
    (load,) = metadata.loads
    assert load.request_id == "a"
    assert load.parts[0].chunks == (
        (keys[1], keys[0], 2, (106, 107)),
        (keys[2], keys[1], 0, (108, 109, 110, 111)),
    )
    assert metadata.may_wait


def test_the_call_after_the_load_loads_nothing(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(16)), tokens)
    assert len(scheduler.build_connector_meta(step()).loads) == 1
    scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), 0)
    output = step(new=[(request, tokens, 300 - tokens)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output) is NO_WORK


def test_a_preempted_request_loads_again_into_its_new_blocks(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 1)), clock)
    for blocks in (range(16), range(50, 66)):
        tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
        scheduler.update_state_after_alloc(request, FakeBlocks(blocks), tokens)
        (load,) = scheduler.build_connector_meta(step()).loads
        assert load.parts[0].chunks[0].block_ids == tuple(blocks[:PER_CHUNK])


def test_chunked_prefill_stores_each_chunk_when_it_is_complete(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(), clock)
    scheduler.on_new_request(request)
    table = {"a": range(20, 39)}
    first = scheduler.build_connector_meta(step(new=[(request, 0, 100)], blocks=table))
    assert stored_chunks(first) == ((keys[0], None, (20, 21, 22, 23)),)
    second = scheduler.build_connector_meta(step(cached=[(request, 100, 120)], blocks=table))
    assert stored_chunks(second) == (
        (keys[1], keys[0], (24, 25, 26, 27)),
        (keys[2], keys[1], (28, 29, 30, 31)),
    )
    third = scheduler.build_connector_meta(step(cached=[(request, 220, 80)], blocks=table))
    assert stored_keys(third) == [keys[3]]
    assert scheduler.build_connector_meta(step(cached=[(request, 300, 1)], blocks=table)) is NO_WORK


def test_chunks_that_the_lookup_found_are_not_stored_again(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys[:2]), clock)
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(8)), tokens)
    output = step(new=[(request, tokens, 300 - tokens)], blocks={"a": range(19)})
    metadata = scheduler.build_connector_meta(output)
    assert stored_keys(metadata) == keys[2:]


def test_a_resumed_request_stores_from_its_new_blocks(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(), clock)
    scheduler.on_new_request(request)
    scheduler.build_connector_meta(step(new=[(request, 0, 130)], blocks={"a": range(19)}))
    output = step(cached=[(request, 0, 300)], resumed=["a"], blocks={"a": range(70, 89)})
    metadata = scheduler.build_connector_meta(output)
    assert stored_keys(metadata) == keys[2:]
    assert stored_chunks(metadata)[0].block_ids == (78, 79, 80, 81)


@pytest.mark.parametrize("save_decode_cache", [False, True])
def test_decode_is_stored_only_on_request(clock, save_decode_cache):
    request = make_request("a", CHUNK + 10)
    scheduler = make(FakeLookup(), clock, save_decode_cache=save_decode_cache)
    scheduler.on_new_request(request)
    table = {"a": range(9)}
    scheduler.build_connector_meta(step(new=[(request, 0, CHUNK + 10)], blocks=table))
    request.append_output_token_ids(list(range(CHUNK)))
    output = step(cached=[(request, 2 * CHUNK - 1, 1)], blocks=table)
    metadata = scheduler.build_connector_meta(output)
    expected = keys_of(request, 2)[1:] if save_decode_cache else []
    assert stored_keys(metadata) == expected


def test_draft_tokens_that_may_be_rejected_are_not_stored(clock):
    request = make_request("a", 2 * CHUNK - 3)
    scheduler = make(FakeLookup(), clock, save_decode_cache=True)
    scheduler.on_new_request(request)
    output = step(new=[(request, 0, 2 * CHUNK + 2)], blocks={"a": range(9)})
    assert stored_keys(scheduler.build_connector_meta(output)) == keys_of(request, 1)


def test_roles(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4))
    producer = make(lookup, clock, may_load=False)
    producer.on_new_request(request)
    assert producer.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets == []
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert len(stored_chunks(producer.build_connector_meta(output))) == 4

    consumer = make(FakeLookup(keys_of(request, 1)), clock, may_store=False)
    assert consumer.get_num_new_matched_tokens(request, 0) == (CHUNK, True)
    assert consumer.build_connector_meta(output) is NO_WORK


def test_a_request_that_failed_to_load_computes_and_stores_again(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys), clock)
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(16)), tokens)
    scheduler.build_connector_meta(step())
    scheduler.update_connector_output(KvrailWorkerMetadata({"a": (keys[2],)}))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 2 * CHUNK, 300 - 2 * CHUNK)], blocks={"a": range(19)})
    assert stored_keys(scheduler.build_connector_meta(output)) == keys[2:]


def test_a_chunk_that_failed_is_absent_for_others_for_a_while(clock):
    first, second = make_request("a", 300), make_request("b", 300)
    keys = keys_of(first, 4)
    scheduler = make(FakeLookup(keys), clock)
    scheduler.on_new_request(first)
    scheduler.update_connector_output(KvrailWorkerMetadata({"a": (keys[1],)}))
    assert scheduler.get_num_new_matched_tokens(second, 0) == (CHUNK, True)
    clock.now += bad_keys.FIRST_PAUSE_SECONDS
    assert scheduler.get_num_new_matched_tokens(make_request("c", 300), 0) == (4 * CHUNK, True)


def test_failed_chunks_are_remembered_within_a_bound(clock, monkeypatch):
    monkeypatch.setattr(bad_keys, "MAX_BAD_KEYS", 2)
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys), clock)
    scheduler.update_connector_output(KvrailWorkerMetadata({"gone": tuple(keys[:3])}))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (CHUNK, True)


def test_a_lookup_that_takes_too_long_is_a_miss(clock):
    request = make_request("a", 300)
    scheduler = make(
        FakeLookup(keys_of(request, 4), answering=False), clock, wait_limit_seconds=2.0
    )
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    clock.now += 2.5
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.take_counters()["lookup_timeouts"] == 1


def test_a_lookup_that_fails_is_a_miss(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4), answering=False)
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    lookup.tickets[0].error = ClosedError("closed")
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.take_counters()["lookup_errors"] == 1


def test_a_store_that_refuses_a_lookup_is_a_miss(clock):
    def refuse(keys):
        raise ClosedError("closed")

    scheduler = make(None, clock)
    scheduler.enable(refuse)
    assert scheduler.get_num_new_matched_tokens(make_request("a", 300), 0) == (0, False)


def test_an_old_answer_is_asked_for_again(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    lookup = FakeLookup()
    scheduler = make(lookup, clock)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    lookup.present = set(keys)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    clock.now += ANSWER_SECONDS + 1
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)


def test_early_lookups_are_bounded(clock):
    lookup = FakeLookup(answering=False)
    scheduler = make(lookup, clock)
    for index in range(MAX_EARLY_LOOKUPS + 5):
        scheduler.on_new_request(make_request(f"r{index}", 300, first=1000 * index))
    assert len(lookup.tickets) == MAX_EARLY_LOOKUPS


def test_an_idle_step_waits_for_nothing_where_other_engines_wait_for_it(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4), answering=False)
    scheduler = make(lookup, clock, waits_when_idle=False)
    scheduler.on_new_request(request)
    assert scheduler.build_connector_meta(step()) is NO_WORK
    assert lookup.tickets[0].waits == []
    lookup.settle(lookup.tickets[0])
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(16)), tokens)
    metadata = scheduler.build_connector_meta(step())
    assert metadata.loads
    assert not metadata.may_wait


def test_an_idle_step_waits_for_a_lookup_once_and_briefly(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4), answering=False)
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    assert lookup.tickets[0].waits == [IDLE_WAIT_SECONDS]
    lookup.settle(lookup.tickets[0])
    scheduler.build_connector_meta(step())
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    assert len(lookup.tickets[0].waits) == 2


def test_an_aborted_request_leaves_nothing_behind(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4), answering=False)
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    scheduler.request_finished("a")
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    assert lookup.tickets[0].waits == []
    scheduler.update_connector_output(KvrailWorkerMetadata({"a": (b"x" * 32,)}))
    scheduler.request_finished("a")


def test_a_request_that_must_not_read_the_cache_is_only_stored(clock):
    request = make_request("a", 300)
    request.skip_reading_prefix_cache = True
    lookup = FakeLookup(keys_of(request, 4))
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets == []
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert len(stored_chunks(scheduler.build_connector_meta(output))) == 4


def test_a_continued_session_is_left_alone(clock):
    request = make_request("a", 300)
    request.resumable = True
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output) is NO_WORK


def test_two_salts_share_no_key(clock):
    one, other = make_request("a", 300, salt="one"), make_request("b", 300, salt="other")
    scheduler = make(FakeLookup(keys_of(one, 4)), clock)
    assert scheduler.get_num_new_matched_tokens(one, 0) == (4 * CHUNK, True)
    assert scheduler.get_num_new_matched_tokens(other, 0) == (0, False)


def test_a_request_that_asks_learns_its_chunk_keys_and_the_log_names_the_first_missing(
    clock, caplog
):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys[:1] + keys[2:]), clock)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (CHUNK, True)
    with caplog.at_level(logging.DEBUG, logger="vllm.kvrail.vllm.scheduler"):
        scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), CHUNK)
    line = f"request a: 1 of 4 chunks found, the first that is missing is {keys[1].hex()}"
    assert line in caplog.text
    assert scheduler.explanation(request) is None
    request.kv_transfer_params = {"kvrail_explain": True}
    assert scheduler.explanation(request) == {
        "kvrail": {
            "looked_up": True,
            "chunk_size": CHUNK,
            "found_chunks": 1,
            "tokens_in_vllms_cache": 0,
            "chunk_keys": [key.hex() for key in keys],
        }
    }
    scheduler.request_finished("a")
    assert scheduler.explanation(request) == {"kvrail": {"looked_up": False}}


def test_an_adapter_that_was_trained_again_shares_no_key(clock):
    def adapter(fingerprint):
        return SimpleNamespace(lora_name="a", lora_path="p", fingerprint=fingerprint)

    lookup = FakeLookup()
    scheduler = make(lookup, clock)
    for name, fingerprint in (("a", b"old"), ("b", b"new"), ("c", b"old"), ("d", None)):
        scheduler.on_new_request(make_request(name, 300, lora=adapter(fingerprint)))
    old, new, same = (ticket.keys for ticket in lookup.tickets)
    assert old == same
    assert not set(old) & set(new)


def test_a_reason_found_with_the_first_request_ends_everything(clock):
    lookup = FakeLookup()
    scheduler = make(None, clock)
    asked = []
    scheduler.enable(lookup, lambda: asked.append(1) or "other hashes")
    for name in ("a", "b"):
        request = make_request(name, 300)
        scheduler.on_new_request(request)
        assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets == []
    assert asked == [1]
    assert not scheduler.enabled


def test_tokens_are_counted_once_per_request(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 3)), clock)
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 2 * BLOCK)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(12)), tokens)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), 0)
    counters = scheduler.take_counters()
    assert counters == {
        "requests_looked_up": 1,
        "hit_tokens": 3 * CHUNK - 2 * BLOCK,
        "miss_tokens": CHUNK,
    }
    assert scheduler.take_counters() == {}


def test_hashes_finer_than_blocks(clock):
    geometry = ChunkGeometry(CHUNK, 2 * BLOCK, BLOCK)
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = ConnectorScheduler(geometry, SchedulerOptions(), watch(clock), clock=clock)
    scheduler.enable(FakeLookup(keys[:1]))
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(2)), tokens)
    output = step(new=[(request, CHUNK, CHUNK)], blocks={"a": range(10)})
    metadata = scheduler.build_connector_meta(output)
    assert metadata.loads[0].parts[0].chunks == ((keys[0], None, 0, (0, 1)),)
    assert stored_chunks(metadata) == ((keys[1], keys[0], (2, 3)),)


@pytest.mark.parametrize("sizes", [(CHUNK, 48, BLOCK), (CHUNK, BLOCK, 48), (CHUNK, 128, 128)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="no multiple"):
        ChunkGeometry(*sizes)


def test_images_without_names_are_left_alone(clock):
    """vLLM counts them then: another process gives another image the same hashes."""
    request = make_request("a", 300)
    request.mm_features = [SimpleNamespace()]
    scheduler = make(FakeLookup(keys_of(request, 4)), clock, items_are_named=False)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output) is NO_WORK
    text = make_request("b", 300)
    assert scheduler.get_num_new_matched_tokens(text, 0) == (4 * CHUNK, True)
