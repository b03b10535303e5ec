"""When a hit is loaded and when it is computed, from costs that are fed in by a false clock."""

from __future__ import annotations

import random

import pytest

from kvrail.vllm.load_or_compute import (
    MAX_TRIAL_PAUSE_SECONDS,
    MIN_SAMPLES,
    MIN_TRIAL_PAUSE_SECONDS,
    TRIAL_PAUSE_FACTOR,
    CostLine,
    LoadOrCompute,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Runs loads and steps of given lengths through the measurements."""

    def __init__(self, min_load_tokens: int | None = None) -> None:
        self.clock = Clock()
        self.costs = LoadOrCompute(
            min_load_tokens, min_step_tokens=256, max_step_tokens=2048, clock=self.clock
        )
        self.count = 0

    def load(self, tokens: int, seconds: float, *, failed: bool = False, trial=False) -> None:
        self.count += 1
        name = f"load {self.count}"
        self.costs.load_began(name, tokens, is_trial=trial)
        self.clock.now += seconds
        self.costs.load_ended(name, failed=failed)

    def step(self, tokens: int, seconds: float, prompt_tokens: int | None = None) -> None:
        self.costs.step_began(tokens if prompt_tokens is None else prompt_tokens, tokens)
        self.clock.now += seconds
        self.costs.step_ended()

    def measure(self, *, load_rate: float, compute_rate: float) -> None:
        for index in range(2 * MIN_SAMPLES):
            tokens = 256 * (1 + index % 4)
            self.load(tokens, tokens / load_rate)
            self.step(tokens, tokens / compute_rate)


@pytest.mark.parametrize("seed", range(20))
def test_the_line_finds_what_the_samples_were_made_of(seed):
    dice = random.Random(seed)
    fixed, per_token = dice.uniform(0.0, 0.5), dice.uniform(1e-6, 1e-3)
    line = CostLine()
    for _ in range(200):
        tokens = dice.randrange(1, 10_000)
        line.add(tokens, fixed + per_token * tokens)
    assert line.parts() == pytest.approx((fixed, per_token), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_part_of_the_line_is_ever_negative(seed):
    dice = random.Random(seed)
    line = CostLine()
    for _ in range(50):
        line.add(dice.randrange(1, 5000), dice.expovariate(1.0))
        fixed, per_token = line.parts()
        assert fixed >= 0.0 and per_token >= 0.0
        assert fixed + per_token > 0.0


def test_samples_of_one_size_give_a_rate():
    line = CostLine()
    for _ in range(10):
        line.add(1000, 2.0)
    assert line.parts() == pytest.approx((0.0, 0.002))
    assert line.tokens_per_second == pytest.approx(500.0)


def test_old_samples_are_forgotten():
    line = CostLine()
    for _ in range(100):
        line.add(1000, 10.0)
    for _ in range(100):
        line.add(1000, 1.0)
    assert line.parts()[1] == pytest.approx(0.001, rel=0.1)


def test_hits_are_loaded_while_nothing_is_known():
    engine = Engine()
    assert engine.costs.decide(256).load
    engine.measure(load_rate=10.0, compute_rate=1000.0)
    assert engine.costs.decide(256).is_trial
    assert not engine.costs.decide(256).load
    # One kind of samples alone decides nothing.
    only_loads = Engine()
    for _ in range(20):
        only_loads.load(256, 100.0)
    assert only_loads.costs.decide(256).load
    assert only_loads.costs.gauges() == {"load_tokens_per_second": pytest.approx(2.56)}


@pytest.mark.parametrize(("load_rate", "compute_rate"), [(50_000.0, 2_000.0), (1_000.0, 20_000.0)])
def test_the_cheaper_way_is_taken(load_rate, compute_rate):
    engine = Engine()
    engine.measure(load_rate=load_rate, compute_rate=compute_rate)
    verdict = engine.costs.decide(1024)
    assert verdict.load_seconds == pytest.approx(1024 / load_rate, rel=0.01)
    assert verdict.compute_seconds == pytest.approx(1024 / compute_rate, rel=0.01)
    if load_rate > compute_rate:
        assert verdict.load and not verdict.is_trial
    else:
        assert verdict.load == verdict.is_trial
        assert not engine.costs.decide(1024).load


def test_short_hits_are_computed_where_a_load_has_a_fixed_cost():
    engine = Engine()
    for index in range(12):
        tokens = 256 * (1 + index % 6)
        engine.load(tokens, 0.5 + tokens / 100_000.0)
        engine.step(tokens, tokens / 2000.0)
    engine.costs.decide(256)  # The trial.
    assert not engine.costs.decide(256).load
    assert engine.costs.decide(4096).load


def test_a_computation_of_many_steps_pays_for_each():
    engine = Engine()
    for index in range(12):
        tokens = 256 * (1 + index % 6)
        engine.step(tokens, 0.1 + tokens / 10_000.0)
    assert engine.costs.compute_seconds(1000) == pytest.approx(0.1 + 0.1)
    assert engine.costs.compute_seconds(8192) == pytest.approx(4 * 0.1 + 0.8192)


def test_a_number_decides_alone():
    always, never_short = Engine(0), Engine(1024)
    for engine in (always, never_short):
        engine.measure(load_rate=1.0, compute_rate=1e6)
    assert always.costs.decide(1).load
    assert not never_short.costs.decide(1023).load
    assert never_short.costs.decide(1024).load


def test_loads_are_tried_again_and_a_good_trial_ends_the_refusals():
    engine = Engine()
    engine.measure(load_rate=10.0, compute_rate=1000.0)
    trial = engine.costs.decide(512)
    assert trial.load and trial.is_trial
    # While it is under way, and for a pause after it, no other one is made.
    engine.costs.load_began("trial", 512, is_trial=True)
    engine.clock.now += 50.0
    assert not engine.costs.decide(512).load
    engine.costs.load_ended("trial", failed=False)
    assert not engine.costs.decide(512).load
    engine.clock.now += MAX_TRIAL_PAUSE_SECONDS
    assert engine.costs.decide(512).is_trial
    engine.load(512, 0.01, trial=True)
    verdict = engine.costs.decide(512)
    assert verdict.load and not verdict.is_trial, "the slow loads do not count any more"


@pytest.mark.parametrize(
    ("seconds", "pause"),
    [(0.01, MIN_TRIAL_PAUSE_SECONDS), (2.0, 2.0 * TRIAL_PAUSE_FACTOR), (90.0, 600.0)],
)
def test_trials_cost_at_most_a_twentieth_of_the_time(seconds, pause):
    engine = Engine()
    engine.measure(load_rate=1e-3, compute_rate=1e9)
    assert engine.costs.decide(512).is_trial
    engine.load(512, seconds, trial=True)
    engine.clock.now += 0.99 * pause
    assert not engine.costs.decide(512).load
    engine.clock.now += 0.02 * pause
    assert engine.costs.decide(512).is_trial


def test_a_trial_whose_request_ends_does_not_end_all_trials():
    engine = Engine()
    engine.measure(load_rate=10.0, compute_rate=1000.0)
    assert engine.costs.decide(512).is_trial
    engine.costs.load_began("gone", 512, is_trial=True)
    engine.costs.forget("gone")
    engine.clock.now += MIN_TRIAL_PAUSE_SECONDS + 0.1
    assert engine.costs.decide(512).is_trial
    # This one never began to load.
    engine.clock.now += MIN_TRIAL_PAUSE_SECONDS + 0.1
    assert engine.costs.decide(512).is_trial


def test_a_load_that_hangs_now_counts_before_it_ends():
    engine = Engine()
    engine.measure(load_rate=10_000.0, compute_rate=1_000.0)
    assert engine.costs.decide(1024).load
    engine.costs.load_began("hangs", 1024)
    engine.clock.now += 5.0
    verdict = engine.costs.decide(1024)
    assert verdict.load_seconds == pytest.approx(5.0)
    assert verdict.is_trial or not verdict.load


def test_loads_that_fail_at_once_do_not_look_cheap():
    engine = Engine()
    engine.measure(load_rate=100.0, compute_rate=1000.0)
    for _ in range(100):
        engine.load(1024, 0.001, failed=True)
    assert engine.costs.load_seconds(1024) == pytest.approx(10.24, rel=0.01)
    # Those that fail late do count.
    for _ in range(100):
        engine.load(1024, 30.0, failed=True)
    assert engine.costs.load_seconds(1024) == pytest.approx(30.0, rel=0.1)


def test_steps_of_decoding_and_small_ones_are_no_measure_of_prefill():
    engine = Engine()
    for _ in range(20):
        engine.step(512, 0.05, prompt_tokens=0)
        engine.step(100, 0.05)
        engine.step(0, 0.05)
    assert "prefill_tokens_per_second" not in engine.costs.gauges()
    for _ in range(20):
        engine.step(1000, 0.5, prompt_tokens=900)
    assert engine.costs.gauges()["prefill_tokens_per_second"] == pytest.approx(2000.0)


def test_a_step_that_was_handed_over_early_begins_when_the_last_one_ends():
    engine = Engine()
    engine.costs.step_began(1000, 1000)
    for _ in range(10):
        engine.costs.step_began(1000, 1000)
        engine.clock.now += 0.25
        engine.costs.step_ended()
    assert engine.costs.compute_seconds(1000) == pytest.approx(0.25)


def test_more_ends_than_beginnings_are_no_error():
    engine = Engine()
    engine.costs.step_ended()
    engine.costs.load_ended("never began", failed=False)
    engine.costs.forget("never began")
    assert engine.costs.gauges() == {}
