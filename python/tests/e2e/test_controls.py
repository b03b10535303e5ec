"""What the other tests compare is able to show a wrong block: damage done on purpose is seen."""

from pathlib import Path
from typing import Any

import pytest
from harness import (
    FLOAT32_BOUND,
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    difference,
    step,
)
from prompts import chunks_in, loadable_tokens, reuse_prompts, select

LOGPROBS_MOVE = 10 * FLOAT32_BOUND


@pytest.fixture(scope="module", params=["", "zero", "swap"])
def controlled(
    request: pytest.FixtureRequest,
    engines: Engines,
    llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[str, Any], Running]:
    """An engine whose loads are spoilt in one way, and once in none."""
    control = request.param
    folder = tmp_path_factory.mktemp("controls")
    prompts = select(reuse_prompts(), "zero")
    steps = [
        step("generate", "cold", prompts=prompts),
        step("wait_for_chunks", directory=str(folder / "kv"), files=chunks_in(prompts)),
        step("make_file", path=str(folder / "control"), text=control),
        step("generate", "loaded", prompts=prompts),
    ]
    job = Job(llama, steps, folder / "kv", environment={"E2E_CONTROL": str(folder / "control")})
    result, running = engines.run(job)
    answer = result["loaded"]["reuse zero"]
    assert answer["cached_tokens"] == loadable_tokens(len(prompts["reuse zero"]))
    return control, result, running


def test_spoilt_bytes_are_seen(controlled: tuple[str, dict[str, Any], Running]) -> None:
    control, _, running = controlled
    if control == "":
        assert assert_loaded_is_stored([running], [running]) == 10
        return
    with pytest.raises(AssertionError, match="other bytes than stored"):
        assert_loaded_is_stored([running], [running])


def test_spoilt_blocks_move_the_answer(
    controlled: tuple[str, dict[str, Any], Running], plain: dict[str, Any]
) -> None:
    control, result, _ = controlled
    expected, actual = plain["reuse zero"], result["loaded"]["reuse zero"]
    if control == "":
        assert_same_answers("no control", plain, result["loaded"])
    elif control == "zero":
        with pytest.raises(AssertionError):
            assert_same_answers("zero", plain, result["loaded"])
        assert difference(expected, actual, float("inf")) > LOGPROBS_MOVE
    else:
        # Attention adds up over whole blocks in any order, so that two swapped blocks are the same
        # to the model; only the bytes can tell.
        print(f"swapped: moved by {difference(expected, actual, float('inf')):.2e}")
