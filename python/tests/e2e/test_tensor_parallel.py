"""What ranks of one tensor-parallel size stored, ranks of another one load."""

from pathlib import Path
from typing import Any

from harness import (
    Engines,
    Job,
    assert_same_answers,
    chunk_keys,
    chunk_path,
    moved,
    step,
)
from prompts import CHUNK_TOKENS, chunks_in, loadable_tokens, reuse_prompts, select

HITS = "vllm:external_prefix_cache_hits_total"
ASSEMBLED = "kvrail:chunks_assembled"
# Without this vLLM asks for a NUMA node for each rank.
TWO_RANKS: dict[str, Any] = {
    "engine": {"tensor_parallel_size": 2},
    "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
}


def loads(reader: Any) -> tuple[int, int]:
    """Chunks that arrived and chunks that did not, over all ranks."""
    failed = [record["failed"] for record in reader.records("load")]
    return failed.count(False), failed.count(True)


def test_one_rank_loads_what_two_stored(
    engines: Engines, llama: Path, plain: dict[str, Any], store: Path
) -> None:
    prompts = select(reuse_prompts(), "first", "second", "third")
    steps = [
        step("generate", "cold", prompts=prompts),
        step("wait_for_chunks", directory=str(store), files=2 * chunks_in(prompts)),
    ]
    cold, writer = engines.run(Job(llama, steps, store, **TWO_RANKS))
    assert len(list(store.glob("tiny-llama-*"))) == 1, "one namespace"
    for folder in ("g0r0h0-1", "g0r0h1-2"):
        assert len(list(store.glob(f"*/{folder}/*/*.safetensors"))) == chunks_in(prompts)
    # Of the first prompt one of two files of the third chunk is gone; of the second the two files
    # of the second chunk, one for each head, have changed places.
    chunk_path(store, chunk_keys(writer, prompts["reuse first"])[2], 1).unlink()
    swapped = chunk_keys(writer, prompts["reuse second"])[1]
    low, high = (chunk_path(store, swapped, rank) for rank in (0, 1))
    aside = store / "aside"
    low.rename(aside)
    high.rename(low)
    aside.rename(high)
    warm, reader = engines.run(Job(llama, [step("generate", "warm", prompts=prompts)], store))
    assert len(list(store.glob("tiny-llama-*"))) == 1, "still one namespace"
    answers = warm["warm"]
    assert moved(answers["reuse first"], HITS) == 2 * CHUNK_TOKENS
    assert moved(answers["reuse third"], HITS) == loadable_tokens(1500)
    assert_same_answers("two ranks store", plain, cold["cold"])
    assert_same_answers("one rank loads", plain, answers)
    arrived, refused = loads(reader)
    assembled = sum(moved(answer, ASSEMBLED) for answer in answers.values())
    print(f"{arrived} chunks arrived, {refused} were refused, {assembled} were counted")
    assert refused == 1, "each file says which head it has"
    assert arrived >= 2 + loadable_tokens(1500) // CHUNK_TOKENS
    assert assembled >= 2


def test_two_ranks_load_what_one_stored(
    engines: Engines, llama: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "kv"
    prompts = select(reuse_prompts(), "first", "third")
    steps = [
        step("generate", "cold", prompts=prompts),
        step("wait_for_chunks", directory=str(store), files=chunks_in(prompts)),
    ]
    cold, _ = engines.run(Job(llama, steps, store))
    assert len(list(store.glob("*/g0r0h0-2/*/*.safetensors"))) == chunks_in(prompts)
    warm, reader = engines.run(
        Job(llama, [step("generate", "warm", prompts=prompts)], store, **TWO_RANKS)
    )
    answers = warm["warm"]
    hits = {name: moved(answer, HITS) for name, answer in answers.items()}
    assert hits["reuse third"] == loadable_tokens(1500)
    assert hits["reuse first"] > 0
    assert_same_answers("one rank stores", plain, cold["cold"])
    assert_same_answers("two ranks load", plain, answers)
    chunks = sum(hits.values()) // CHUNK_TOKENS
    assert loads(reader) == (2 * chunks, 0)
    assert not list(store.glob("*/g0r0h0-1/*/*.safetensors")), "nothing was stored again"
