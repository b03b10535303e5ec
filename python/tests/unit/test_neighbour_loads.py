"""What another connector loads inside a step, and may fail to: nothing after it is stored yet."""

from __future__ import annotations

from fakes import BLOCK, CHUNK, FakeBlocks, FakeLookup, keys_of, make, make_request, step
from vllm.v1.core.sched.output import SchedulerOutput

from kvrail.vllm.scheduler import ConnectorScheduler


def loading(**what: object) -> SchedulerOutput:
    output = step(**what)
    output.has_sync_kv_loads = True
    return output


def taken_up(scheduler: ConnectorScheduler, request: object, local: int, blocks: range) -> None:
    """vLLM takes a request up with blocks of which another connector loads some."""
    assert scheduler.get_num_new_matched_tokens(request, local) == (0, False)
    scheduler.update_state_after_alloc(request, FakeBlocks(blocks), 0)


def stored(scheduler: ConnectorScheduler, output: SchedulerOutput) -> list[bytes]:
    metadata = scheduler.build_connector_meta(output)
    return [chunk.key for part in metadata.stores for chunk in part.chunks]


def test_chunks_are_stored_once_vllm_knows_that_the_load_was_right(clock):
    request, blocks = make_request("a", 4 * CHUNK), range(1, 17)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, request, 0, blocks)
    first = loading(new=[(request, 2 * CHUNK, 2 * CHUNK)], blocks={"a": blocks})
    assert stored(scheduler, first) == []
    # With asynchronous scheduling the next step is planned before the first one has ended.
    second = step(cached=[(request, 4 * CHUNK, 1)], blocks={"a": blocks})
    assert stored(scheduler, second) == []
    scheduler.step_ended()
    third = step(cached=[(request, 4 * CHUNK + 1, 1)], blocks={"a": blocks})
    assert stored(scheduler, third) == keys_of(request, 4)


def test_after_a_failure_the_chunks_that_were_computed_again_are_stored(clock):
    request, blocks = make_request("a", 4 * CHUNK), range(1, 17)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, request, 0, blocks)
    first = loading(new=[(request, 2 * CHUNK, CHUNK)], blocks={"a": blocks})
    assert stored(scheduler, first) == []
    scheduler.step_ended()
    # vLLM goes back to the first block that failed.
    again = step(cached=[(request, BLOCK, 2 * CHUNK - BLOCK)], blocks={"a": blocks})
    assert stored(scheduler, again) == keys_of(request, 2)


def test_requests_that_share_such_a_block_wait_and_others_do_not(clock):
    loaded = make_request("loaded", 2 * CHUNK)
    sharing = make_request("sharing", 3 * CHUNK)
    other = make_request("other", 2 * CHUNK, first=1000)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, loaded, 0, range(1, 9))
    # Its first two chunks are in vLLM's cache: the blocks that are being loaded.
    taken_up(scheduler, sharing, 2 * CHUNK, range(1, 13))
    taken_up(scheduler, other, 0, range(20, 28))
    tables = {"loaded": range(1, 9), "sharing": range(1, 13), "other": range(20, 28)}
    output = loading(
        new=[(loaded, CHUNK, CHUNK), (sharing, 2 * CHUNK, CHUNK), (other, 0, 2 * CHUNK)],
        blocks=tables,
    )
    assert stored(scheduler, output) == keys_of(other, 2)
    scheduler.step_ended()
    output = step(cached=[(loaded, 2 * CHUNK, 1), (sharing, 3 * CHUNK, 1)], blocks=tables)
    assert stored(scheduler, output) == keys_of(loaded, 2) + keys_of(sharing, 3)


def test_what_vllm_had_itself_is_in_no_doubt(clock):
    """A prompt that many requests begin with is not held up by what one of them loads."""
    loaded, other = make_request("loaded", 3 * CHUNK), make_request("other", 3 * CHUNK)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, loaded, CHUNK, range(1, 13))
    taken_up(scheduler, other, CHUNK, [*range(1, 5), *range(20, 28)])
    tables = {"loaded": range(1, 13), "other": [*range(1, 5), *range(20, 28)]}
    output = loading(
        new=[(loaded, 2 * CHUNK, CHUNK), (other, CHUNK, 2 * CHUNK)],
        blocks=tables,
    )
    assert stored(scheduler, output) == keys_of(other, 3)


def test_the_blocks_of_a_request_that_is_left_alone_are_in_doubt_as_a_whole(clock):
    """Nothing was asked of it, so nothing is known of where its blocks come from."""
    alone, sharing = make_request("alone", 2 * CHUNK), make_request("sharing", 3 * CHUNK)
    alone.resumable = True
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, alone, 0, range(1, 9))
    taken_up(scheduler, sharing, CHUNK, range(1, 13))
    tables = {"alone": range(1, 9), "sharing": range(1, 13)}
    output = loading(new=[(alone, CHUNK, CHUNK), (sharing, CHUNK, 2 * CHUNK)], blocks=tables)
    assert stored(scheduler, output) == []


def test_a_preempted_request_that_is_loaded_again_is_in_doubt_again(clock):
    request = make_request("a", 4 * CHUNK)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, request, 0, range(1, 17))
    assert stored(scheduler, step(new=[(request, 0, CHUNK)], blocks={"a": range(1, 17)}))
    scheduler.step_ended()
    taken_up(scheduler, request, 0, range(30, 46))
    output = loading(
        cached=[(request, 2 * CHUNK, CHUNK)], resumed=["a"], blocks={"a": range(30, 46)}
    )
    assert stored(scheduler, output) == []
    scheduler.step_ended()
    output = step(cached=[(request, 3 * CHUNK, CHUNK)], blocks={"a": range(30, 46)})
    assert stored(scheduler, output) == keys_of(request, 4)[1:]


def test_a_step_without_such_loads_holds_nothing_up(clock):
    request, blocks = make_request("a", 2 * CHUNK), range(1, 9)
    scheduler = make(FakeLookup(), clock)
    taken_up(scheduler, request, 0, blocks)
    # It begins with tokens that were loaded before the step.
    output = step(new=[(request, CHUNK, CHUNK)], blocks={"a": blocks})
    assert stored(scheduler, output) == keys_of(request, 2)
