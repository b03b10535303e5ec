"""Who may use which chunk: salts that never share, and the roles of a connector."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    chunk_keys,
    moved,
    step,
)
from prompts import BLOCK_TOKENS, CHUNK_TOKENS, chunks_in, loadable_tokens, reuse_prompts, select

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


def test_decoded_tokens_are_stored_only_when_asked_to(
    engines: Engines, llama: Path, tmp_path: Path
) -> None:
    """1500 tokens and 60 decoded ones end in a sixth chunk."""
    store = tmp_path / "kv"
    prompts = select(reuse_prompts(), "third")
    kept, left = "kept", "left"
    steps = [step("generate", prompts=prompts, max_tokens=60)]
    saved, writer = engines.run(
        Job(
            llama,
            [*steps, step("wait_for_chunks", directory=str(store), files=chunks_in(prompts) + 1)],
            store,
            settings={"save_decode_cache": True},
        )
    )
    tokens = prompts["reuse third"] + saved["generate"]["reuse third"]["tokens"]
    steps = [
        step("generate", kept, prompts={"follow-up": tokens}),
        step("generate", left, prompts={"follow-up": tokens}, salt="fresh"),
        # 60 decoded tokens of a salt of their own end in a sixth chunk, too, but are not stored.
        step("generate", "decoded", prompts=prompts, salt="fresh decode", max_tokens=60),
        step("pause", seconds=0.5),
    ]
    result, reader = engines.run(Job(llama, steps, store))
    assert moved(result[kept]["follow-up"], HITS) == 1536
    assert moved(result[left]["follow-up"], HITS) == 0
    assert_same_answers("decoded", result[left], result[kept])
    assert assert_loaded_is_stored([writer], [reader]) == 12
    keys = chunk_keys(reader, prompts["reuse third"], "fresh decode")
    stored = {record["key"] for record in reader.records("store")}
    assert len(keys) == chunks_in(prompts) and set(keys) <= stored
    assert len(stored) == 6 + len(keys)


def test_a_restarted_engine_finds_the_shared_tier_warm(
    engines: Engines, llama: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    """The second engine reads no file: bytes come from memory that the first one left."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    store = tmp_path / "kv"
    prompts = select(reuse_prompts(), "third")
    chunks = chunks_in(prompts)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        shared = {
            "local_cpu": True,
            "max_local_cpu_size": 0.1,
            "extra_config": {"local_cpu_shared": f"{memory}/tier"},
        }
        steps = [
            step("generate", "cold", prompts=prompts),
            step("wait_for_chunks", directory=str(store), files=chunks),
        ]
        _, writer = engines.run(Job(llama, steps, store, settings=shared))
        warm = [step("generate", "warm", prompts=prompts)]
        result, reader = engines.run(Job(llama, warm, store, settings=shared))
    answer = result["warm"]["reuse third"]
    assert moved(answer, HITS) == EXPECTED_HITS
    assert moved(answer, "kvrail:local_cpu_chunks_loaded_total") == chunks
    assert_same_answers("warm", plain, result["warm"])
    blocks = chunks * CHUNK_TOKENS // BLOCK_TOKENS
    assert assert_loaded_is_stored([writer], [reader]) == blocks
