"""A model on two tensor-parallel ranks."""

from pathlib import Path
from typing import Any

from harness import (
    Engines,
    Job,
    assert_loaded_is_stored,
    assert_same_answers,
    chunk_keys,
    chunk_path,
    moved,
    step,
)
from prompts import CHUNK_TOKENS, chunks_in, loadable_tokens, reuse_prompts, select

HITS = "vllm:external_prefix_cache_hits_total"


def test_a_hit_needs_the_chunks_of_all_ranks(
    engines: Engines, llama: Path, plain: dict[str, Any], store: Path
) -> None:
    prompts = select(reuse_prompts(), "first", "second", "third")
    engine = {"tensor_parallel_size": 2}
    # Without this vLLM asks for a NUMA node for each rank.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    steps = [
        step("generate", "cold", prompts=prompts),
        step("wait_for_chunks", directory=str(store), files=2 * chunks_in(prompts)),
    ]
    cold, writer = engines.run(Job(llama, steps, store, engine=engine, environment=environment))
    for rank in (0, 1):
        heads = f"g0r0h{rank}-{rank + 1}"
        stored = {path.stem for path in store.glob(f"*/{heads}/*/*.safetensors")}
        ours = [0, rank, rank + 1]
        assert stored == {r["key"] for r in writer.records("store") if r["rank"] == ours}
        assert len(stored) == chunks_in(prompts)
    # Of the first prompt rank 1 loses the third chunk, of the second rank 0 loses the first.
    for name, rank, index in (("reuse first", 1, 2), ("reuse second", 0, 0)):
        chunk_path(store, chunk_keys(writer, prompts[name])[index], rank).unlink()
    steps = [step("generate", "warm", prompts=prompts)]
    warm, reader = engines.run(Job(llama, steps, store, engine=engine, environment=environment))
    hits = {name: moved(answer, HITS) for name, answer in warm["warm"].items()}
    assert hits == {
        "reuse first": 2 * CHUNK_TOKENS,
        "reuse second": 0,
        "reuse third": loadable_tokens(1500),
    }
    assert_same_answers("two ranks cold", plain, cold["cold"])
    assert_same_answers("two ranks warm", plain, warm["warm"])
    blocks = assert_loaded_is_stored([writer], [reader])
    print(f"compared the bytes of {blocks} blocks")
    assert blocks == 2 * 2 * (sum(hits.values()) // CHUNK_TOKENS)
