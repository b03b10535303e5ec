"""Which weights chunk keys stand for after vLLM reset its caches."""

from __future__ import annotations

import hashlib
import logging
from types import SimpleNamespace

import pytest
from fakes import CHUNK, FakeBlocks, FakeLookup, keys_of, make, make_request, step, watch
from vllm.v1.core.sched.output import SchedulerOutput

from kvrail.vllm.loaded_weights import WeightsReport
from kvrail.vllm.metadata import NO_WORK, NO_WORK_MAY_WAIT, KvrailWorkerMetadata
from kvrail.vllm.scheduler import ConnectorScheduler

AS_LOADED = WeightsReport("a" * 64, is_as_loaded=True)
TRAINED = WeightsReport("b" * 64, is_as_loaded=False)
UNREADABLE = WeightsReport("", is_as_loaded=False, problem="no way to the weights in memory")


def computing() -> SchedulerOutput:
    """A step that computes a token of a request which kvrail has nothing to do with."""
    request = make_request("computing", 1)
    return step(new=[(request, 0, 1)], blocks={"computing": [99]})


def answer(scheduler: ConnectorScheduler, *reports: WeightsReport) -> int:
    """Has the scheduler ask, and each worker answer; the number of the question."""
    question = scheduler.build_connector_meta(computing()).weights_question
    assert question is not None
    found = {(question, rank): report for rank, report in enumerate(reports)}
    scheduler.update_connector_output(KvrailWorkerMetadata(weights=found))
    return question


def salted(keys: list[bytes], *reports: WeightsReport) -> list[bytes]:
    """The keys of chunks of these weights, as docs/format.md has them."""
    digests = b"".join(bytes.fromhex(report.digest) for report in reports)
    salt = hashlib.sha256(b"kvrail weights" + digests).digest()
    return [hashlib.sha256(salt + key).digest() for key in keys]


def test_after_a_reset_a_request_waits_until_the_weights_are_known(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4))
    scheduler = make(lookup, clock)
    scheduler.weights_may_have_changed()
    scheduler.on_new_request(request)
    assert lookup.tickets == [], "nobody knows what to ask for"
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    answer(scheduler, AS_LOADED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)


def test_the_question_is_put_once(clock):
    scheduler = make(FakeLookup(), clock)
    scheduler.weights_may_have_changed()
    assert scheduler.build_connector_meta(computing()).weights_question == 1
    assert scheduler.build_connector_meta(computing()) is NO_WORK
    scheduler.weights_may_have_changed()
    assert scheduler.build_connector_meta(computing()).weights_question == 2


def test_nobody_is_asked_while_vllm_is_paused_or_asleep(clock):
    """A request that is aborted then makes a step, before the weights are replaced."""
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    scheduler.weights_may_have_changed()
    scheduler.on_new_request(request)
    for _ in range(3):
        assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    # It goes on, and asks what the first of those that wait can load.
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert scheduler.build_connector_meta(step()).weights_question == 1


def test_a_request_that_waited_before_the_pause_is_no_reason_to_ask_in_it(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    scheduler.weights_may_have_changed()
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert scheduler.build_connector_meta(step()).weights_question == 1
    scheduler.weights_may_have_changed()
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert scheduler.build_connector_meta(step()).weights_question == 2


def test_chunks_of_other_weights_have_other_keys(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    lookup = FakeLookup(keys)
    scheduler = make(lookup, clock)
    scheduler.weights_may_have_changed()
    answer(scheduler, TRAINED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert lookup.tickets[0].keys == salted(keys, TRAINED)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    (part,) = scheduler.build_connector_meta(output).stores
    assert [chunk.key for chunk in part.chunks] == salted(keys, TRAINED)
    assert [chunk.parent for chunk in part.chunks[1:]] == salted(keys[:3], TRAINED)


def test_adapters_and_weights_are_both_in_a_key(clock):
    lora = SimpleNamespace(lora_name="x", lora_path="p", fingerprint=b"f" * 32)
    request = make_request("a", 300, lora=lora)
    lookup = FakeLookup()
    scheduler = make(lookup, clock)
    scheduler.weights_may_have_changed()
    answer(scheduler, TRAINED)
    scheduler.get_num_new_matched_tokens(request, 0)
    salt = hashlib.sha256(b"kvrail weights" + bytes.fromhex(TRAINED.digest)).digest()
    first = hashlib.sha256(salt + b"f" * 32 + keys_of(request, 1)[0]).digest()
    assert lookup.tickets[0].keys[0] == first


def test_one_rank_with_other_weights_is_enough(clock):
    request = make_request("a", 300)
    lookup = FakeLookup()
    scheduler = make(lookup, clock, weights=watch(clock, workers=2))
    scheduler.weights_may_have_changed()
    answer(scheduler, AS_LOADED, TRAINED)
    scheduler.get_num_new_matched_tokens(request, 0)
    assert lookup.tickets[0].keys == salted(keys_of(request, 4), AS_LOADED, TRAINED)


def test_all_ranks_have_to_answer_and_late_answers_to_older_questions_count_nothing(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock, weights=watch(clock, workers=2))
    scheduler.weights_may_have_changed()
    scheduler.build_connector_meta(computing())
    scheduler.weights_may_have_changed()
    old = {(1, 0): AS_LOADED, (1, 1): AS_LOADED}
    scheduler.update_connector_output(KvrailWorkerMetadata(weights=old))
    question = answer(scheduler, AS_LOADED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    rest = {(question, 1): AS_LOADED}
    scheduler.update_connector_output(KvrailWorkerMetadata(weights=rest))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)


def test_without_an_answer_requests_go_on_after_the_wait_limit_and_nothing_is_stored(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    scheduler.weights_may_have_changed()
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    clock.now += 31.0
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output).stores == ()


@pytest.mark.parametrize("changeable", [True, False])
def test_weights_that_cannot_be_told_end_loads_and_stores(clock, caplog, changeable):
    request = make_request("a", 300)
    weights = watch(clock, changeable=changeable)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock, weights=weights)
    scheduler.weights_may_have_changed()
    with caplog.at_level(logging.ERROR, logger="vllm.kvrail.vllm.weights_watch"):
        answer(scheduler, UNREADABLE if changeable else TRAINED)
    assert ("no way to the weights" if changeable else "name no weights") in caplog.text
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output).stores == ()
    scheduler.weights_may_have_changed()
    answer(scheduler, AS_LOADED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)


def test_a_request_that_goes_on_over_a_reset_is_left_alone(clock):
    """Its KV cache is of two kinds of weights, perhaps."""
    request, later = make_request("a", 300), make_request("b", 300, first=1000)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    scheduler.get_num_new_matched_tokens(request, 0)
    request.num_computed_tokens = CHUNK
    scheduler.weights_may_have_changed()
    answer(scheduler, AS_LOADED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.get_num_new_matched_tokens(later, 0) == (0, False)
    blocks = {"a": range(19), "b": range(20, 39)}
    output = step(new=[(later, 0, 300)], cached=[(request, CHUNK, 236)], blocks=blocks)
    (part,) = scheduler.build_connector_meta(output).stores
    assert [chunk.key for chunk in part.chunks] == keys_of(later, 4)


def test_a_request_that_was_preempted_is_stored_again(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(), clock)
    scheduler.get_num_new_matched_tokens(request, 0)
    blocks = {"a": range(19)}
    scheduler.build_connector_meta(step(new=[(request, 0, 300)], blocks=blocks))
    scheduler.weights_may_have_changed()
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    answer(scheduler, TRAINED)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    output = step(cached=[(request, 0, 300)], resumed=["a"], blocks=blocks)
    (part,) = scheduler.build_connector_meta(output).stores
    assert [chunk.key for chunk in part.chunks] == salted(keys_of(request, 4), TRAINED)


def test_a_reset_of_vllms_own_cache_alone_is_seen(clock):
    """That is what trainers call; vLLM tells connectors only if it is asked to."""
    pool = SimpleNamespace(cached_block_hash_to_block={})
    weights = watch(clock)
    weights.follow(pool)
    scheduler = make(FakeLookup(), clock, weights=weights)
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    pool.cached_block_hash_to_block = {}
    assert scheduler.build_connector_meta(computing()).weights_question == 1
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT


def test_a_failed_load_of_before_a_reset_changes_nothing(clock):
    request = make_request("a", 300)
    keys = keys_of(request, 4)
    scheduler = make(FakeLookup(keys), clock)
    tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
    scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), tokens)
    scheduler.build_connector_meta(step())
    request.num_computed_tokens = tokens
    scheduler.weights_may_have_changed()
    failed = KvrailWorkerMetadata(failures={"a": (keys[1],)})
    scheduler.update_connector_output(failed, {"a"})
    answer(scheduler, TRAINED)
    output = step(cached=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output).stores == ()


def test_metadata_of_two_workers_is_merged():
    first = KvrailWorkerMetadata(weights={(1, 0): AS_LOADED})
    second = KvrailWorkerMetadata(weights={(1, 1): TRAINED})
    assert first.aggregate(second).weights == {(1, 0): AS_LOADED, (1, 1): TRAINED}


def test_a_lookup_of_before_a_reset_answers_nothing_of_after_it(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4), answering=False)
    scheduler = make(lookup, clock)
    scheduler.on_new_request(request)
    scheduler.weights_may_have_changed()
    answer(scheduler, TRAINED)
    lookup.settle(lookup.tickets[0])
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    lookup.settle(lookup.tickets[1])
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)


def test_an_answer_to_an_older_question_is_not_one_to_the_newer(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock, weights=watch(clock, workers=2))
    scheduler.weights_may_have_changed()
    answer(scheduler, AS_LOADED)
    scheduler.weights_may_have_changed()
    question = scheduler.build_connector_meta(computing()).weights_question
    rest = {(question, 1): AS_LOADED}
    scheduler.update_connector_output(KvrailWorkerMetadata(weights=rest))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (None, False)


def test_a_vllm_that_keeps_its_blocks_in_another_way_is_told_of_and_served(clock, caplog):
    weights = watch(clock)
    with caplog.at_level(logging.WARNING, logger="vllm.kvrail.vllm.weights_watch"):
        weights.follow(SimpleNamespace())
    assert "reset_connector" in caplog.text
    scheduler = make(FakeLookup(), clock, weights=weights)
    assert scheduler.build_connector_meta(step()) is NO_WORK_MAY_WAIT
    scheduler.weights_may_have_changed()
    assert scheduler.build_connector_meta(computing()).weights_question == 1
