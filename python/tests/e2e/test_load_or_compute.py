"""Real vLLM on a mount that is slower than computing: hits are computed until it is quick again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_mount import CannotMountError, FaultyMount
from harness import Engines, Job, assert_same_answers, moved, step
from prompts import chunks_in, random_prompt

SEED = 5
# Every prompt has two chunks and a tail, and is asked for once while it can be a hit.
SLOW = {f"slow {index}": random_prompt(f"slow {index}", 700) for index in range(12)}
QUICK = {f"quick {index}": random_prompt(f"quick {index}", 700) for index in range(8)}
# Far above what the tiny model's prefill takes, far below what takes a path out of use.
DELAY_SECONDS = 1.0
SETTINGS = {"wait_limit_seconds": 30, "slow_limit_seconds": 20, "min_load_tokens": "auto"}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyMount]:
    try:
        mounted = FaultyMount(tmp_path_factory.mktemp("slow"), SEED)
    except CannotMountError as error:
        pytest.skip(f"cannot mount a faulty file system: {error}")
    yield mounted
    mounted.unmount()


@pytest.fixture(scope="module")
def answered(engines: Engines, llama: Path, mounted: FaultyMount) -> dict[str, Any]:
    control = str(mounted.control)
    known = SLOW | QUICK
    steps = [
        step("generate", "cold", prompts=known),
        step("wait_for_chunks", directory=str(mounted.source), files=chunks_in(known)),
        step(
            "make_file",
            path=control,
            text=f"open *.safetensors delay={int(DELAY_SECONDS * 1000)}ms",
        ),
        step("generate", "slow", prompts=SLOW),
        step("make_file", path=control, text=""),
        # A trial of a second is followed by a pause of twenty, on a busy machine by a longer one.
        step("pause", seconds=45.0),
        step("generate", "quick", prompts=QUICK),
    ]
    return engines.start(Job(llama, steps, mounted.path, settings=SETTINGS)).wait()


HITS = "kvrail:hit_tokens_total"
DECLINED = "kvrail:loads_declined_total"
# Samples of both kinds that are needed, and the first trial.
LEARNING = 5


def total(answers: dict[str, Any], name: str) -> int:
    """How far a counter moved; it may do so one request late."""
    return int(sum(moved(answer, name) for answer in answers.values()))


def test_answers_are_right_either_way(answered: dict[str, Any]) -> None:
    assert_same_answers("slow", answered["cold"], answered["slow"])
    assert_same_answers("quick", answered["cold"], answered["quick"])


def test_a_slow_mount_is_found_out_and_its_hits_are_computed(answered: dict[str, Any]) -> None:
    seconds = [answer["seconds"] for answer in answered["slow"].values()]
    declined = total(answered["slow"], DECLINED)
    print("seconds:", ", ".join(f"{value:.2f}" for value in seconds), "declined:", declined)
    assert all(value >= DELAY_SECONDS for value in seconds[: LEARNING - 1]), "these were loaded"
    assert declined >= len(SLOW) - LEARNING - 1
    for value in seconds[LEARNING:]:
        assert value < DELAY_SECONDS, "who is not loaded does not wait for the mount"


def test_loads_are_tried_again(answered: dict[str, Any]) -> None:
    hits = total(answered["quick"], HITS)
    print(f"hit tokens: {hits}, declined: {total(answered['quick'], DECLINED)}")
    # One trial at least. Whether the next two small chunks are worth a load is then measured anew.
    assert hits >= 512
