"""How long a chunk that failed to load is taken for absent."""

from __future__ import annotations

import random

import pytest

from kvrail.vllm.bad_keys import (
    FIRST_PAUSE_SECONDS,
    MAX_PAUSE_SECONDS,
    PAUSE_FACTOR,
    BadKeys,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def is_bad(bad: BadKeys, key: bytes) -> bool:
    return bad.good_prefix([key]) == 0


def test_a_chunk_that_failed_once_is_tried_again_soon(clock):
    bad = BadKeys(clock)
    bad.add([b"a"])
    clock.now += 0.99 * FIRST_PAUSE_SECONDS
    assert bad and is_bad(bad, b"a") and not is_bad(bad, b"b")
    clock.now += 0.01 * FIRST_PAUSE_SECONDS
    assert not bad and not is_bad(bad, b"a")


def test_a_chunk_that_goes_on_failing_is_tried_ever_less_often(clock):
    bad = BadKeys(clock)
    pauses = []
    for _ in range(8):
        bad.add([b"a"])
        began = clock.now
        while is_bad(bad, b"a"):
            clock.now += 0.125
        pauses.append(clock.now - began)
    expected = [min(FIRST_PAUSE_SECONDS * PAUSE_FACTOR**n, MAX_PAUSE_SECONDS) for n in range(8)]
    assert pauses == expected


def test_loads_that_fail_together_are_one_failure(clock):
    bad = BadKeys(clock)
    for _ in range(10):
        bad.add([b"a"])
        clock.now += 0.05
    clock.now += FIRST_PAUSE_SECONDS - 0.05
    assert not is_bad(bad, b"a")


def test_a_failure_long_after_the_last_counts_as_the_first(clock):
    bad = BadKeys(clock)
    for _ in range(4):
        bad.add([b"a"])
        clock.now += MAX_PAUSE_SECONDS
    clock.now += 2 * MAX_PAUSE_SECONDS
    bad.add([b"a"])
    clock.now += FIRST_PAUSE_SECONDS
    assert not is_bad(bad, b"a")


@pytest.mark.parametrize("seed", range(20))
def test_each_key_has_a_time_of_its_own(clock, seed):
    """Against a model that keeps every failure."""
    chance = random.Random(seed)
    keys = [bytes([n]) for n in range(5)]
    bad, model = BadKeys(clock), {key: (0.0, 0.0) for key in keys}
    for _ in range(400):
        clock.now += chance.choice([0.0, 0.5, 3.0, 30.0, 150.0])
        failed = chance.sample(keys, chance.randrange(3))
        bad.add(failed)
        for key in failed:
            seconds, until = model[key]
            if clock.now >= until + MAX_PAUSE_SECONDS:
                seconds = FIRST_PAUSE_SECONDS
            elif clock.now >= until:
                seconds = min(seconds * PAUSE_FACTOR, MAX_PAUSE_SECONDS)
            model[key] = (seconds, clock.now + seconds)
        expected = {key for key in keys if clock.now < model[key][1]}
        assert {key for key in keys if is_bad(bad, key)} == expected
        assert bool(bad) == bool(expected)
