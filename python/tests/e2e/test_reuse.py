"""Who may use which chunk: salts that never share, and the roles of a connector."""

from pathlib import Path
from typing import Any

import pytest
from harness import Engines, Job, Running, assert_same_answers, chunk_keys, moved, step
from prompts import chunks_in, loadable_tokens, reuse_prompts, select

HITS = "vllm:external_prefix_cache_hits_total"
EXPECTED_HITS = loadable_tokens(1500)


@pytest.fixture(scope="module")
def salted(engines: Engines, llama: Path, store: Path) -> tuple[dict[str, Any], Running]:
    """One prompt under two salts and under none, twice each, in one engine."""
    prompts = select(reuse_prompts(), "salted")
    steps = []
    for salt in ("blue", "red", None):
        for turn in ("first", "second"):
            steps.append(step("generate", f"{salt} {turn}", prompts=prompts, salt=salt))
            files = (len({s["with"]["salt"] for s in steps if s["do"] == "generate"})) * chunks_in(
                prompts
            )
            steps.append(step("wait_for_chunks", directory=str(store), files=files))
    return engines.run(Job(llama, steps, store))


@pytest.mark.parametrize("salt", ["blue", "red", None])
def test_a_salt_finds_its_own_chunks_only(
    salted: tuple[dict[str, Any], Running], plain: dict[str, Any], salt: str | None
) -> None:
    result, _ = salted
    first, second = result[f"{salt} first"], result[f"{salt} second"]
    assert moved(first["reuse salted"], HITS) == 0
    assert moved(second["reuse salted"], HITS) == EXPECTED_HITS
    assert_same_answers(f"salt {salt} first", plain, first)
    assert_same_answers(f"salt {salt} second", plain, second)


def test_salts_have_no_chunk_key_in_common(salted: tuple[dict[str, Any], Running]) -> None:
    _, running = salted
    tokens = reuse_prompts()["reuse salted"]
    keys = [set(chunk_keys(running, tokens, salt)) for salt in ("blue", "red", None)]
    assert all(len(each) == len(tokens) // 256 for each in keys)
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_a_producer_only_stores_and_a_consumer_only_loads(
    engines: Engines, llama: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "kv"
    first, second = (select(reuse_prompts(), name) for name in ("first", "second"))
    produced, asked = tmp_path / "produced", tmp_path / "asked"
    consumer = engines.start(
        Job(
            llama,
            [
                step("generate", "cold", prompts=first),
                step("pause", seconds=0.5),
                step("list_chunks", "after cold", directory=str(store)),
                step("make_file", path=str(asked)),
                step("wait_for_file", path=str(produced)),
                step("generate", "warm", prompts=second),
            ],
            store,
            role="kv_consumer",
        )
    )
    producer = engines.start(
        Job(
            llama,
            [
                step("wait_for_file", path=str(asked)),
                step("generate", "cold", prompts=second),
                step("wait_for_chunks", directory=str(store), files=chunks_in(second)),
                step("generate", "warm", prompts=second),
                step("make_file", path=str(produced)),
            ],
            store,
            role="kv_producer",
        )
    )
    produced_result, consumed = producer.wait(), consumer.wait()
    assert consumed["after cold"] == {} and consumer.records("store") == []
    assert moved(consumed["warm"]["reuse second"], HITS) == EXPECTED_HITS
    assert moved(produced_result["warm"]["reuse second"], HITS) == 0
    assert producer.records("load") == []
    for result in (consumed, produced_result):
        assert_same_answers("cold", plain, result["cold"])
        assert_same_answers("warm", plain, result["warm"])
