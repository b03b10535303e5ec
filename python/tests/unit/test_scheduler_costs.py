"""The scheduler side with the costs of loads and steps: which hits it loads."""

from __future__ import annotations

import pytest
from fakes import (
    BLOCK,
    CHUNK,
    Clock,
    FakeBlocks,
    FakeLookup,
    keys_of,
    make,
    make_request,
    step,
)

from kvrail.vllm.metadata import NO_WORK
from kvrail.vllm.scheduler import ConnectorScheduler


def teach(scheduler: ConnectorScheduler, clock: Clock, *, load: float, compute: float) -> None:
    """Has the scheduler see loads and steps of so many seconds for prompts of 300 tokens."""
    for index in range(8):
        request = make_request(f"teach {index}", 300)
        tokens, _ = scheduler.get_num_new_matched_tokens(request, 0)
        if tokens:
            scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), tokens)
            scheduler.build_connector_meta(step())
            scheduler.step_ended()
            clock.now += load
            scheduler.update_connector_output(None, {request.request_id})
        scheduler.build_connector_meta(
            step(new=[(request, 0, 300)], blocks={request.request_id: range(19)})
        )
        clock.now += compute
        scheduler.step_ended()
        scheduler.request_finished(request.request_id)


def test_a_hit_that_is_cheaper_to_compute_is_not_loaded_and_not_stored_again(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    teach(scheduler, clock, load=2.0, compute=0.1)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    # vLLM asks again when it had no room: the answer stays, and counts once.
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    counters = scheduler.take_counters()
    assert counters["loads_declined"] >= 1
    assert counters["declined_tokens"] == counters["loads_declined"] * 4 * CHUNK
    assert counters["prefill_tokens_per_second"] == pytest.approx(3000.0)
    assert counters["load_tokens_per_second"] < 200.0
    scheduler.update_state_after_alloc(request, FakeBlocks(range(19)), 0)
    output = step(new=[(request, 0, 300)], blocks={"a": range(19)})
    assert scheduler.build_connector_meta(output) is NO_WORK


def test_a_hit_that_is_cheaper_to_load_is_loaded(clock):
    request = make_request("a", 300)
    scheduler = make(FakeLookup(keys_of(request, 4)), clock)
    teach(scheduler, clock, load=0.1, compute=2.0)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)
    assert "loads_declined" not in scheduler.take_counters()


def test_min_load_tokens_decides_alone(clock):
    request = make_request("a", 300)
    lookup = FakeLookup(keys_of(request, 4))
    scheduler = make(lookup, clock, min_load_tokens=4 * CHUNK - BLOCK)
    teach(scheduler, clock, load=2.0, compute=0.1)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (4 * CHUNK, True)
    # What vLLM has itself does not count.
    other = make_request("b", 300)
    assert scheduler.get_num_new_matched_tokens(other, 2 * BLOCK) == (0, False)
