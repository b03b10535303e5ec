"""kvrail beside another connector, under vLLM's `MultiConnector`."""

from pathlib import Path
from typing import Any

import tiny_model
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
from prompts import CHUNK_TOKENS, chunks_in, loadable_tokens, random_prompt

HITS = "vllm:external_prefix_cache_hits_total"


def test_it_loads_and_stores_beside_another(engines: Engines, tmp_path: Path) -> None:
    """The other, of kvrail's own kind, comes first; a model with two KV cache groups.

    What both have is loaded from the first, what it lost from the second.
    """
    model = tiny_model.build_mixed(tmp_path / "model", (False, True, False, True), 300)
    store, other = tmp_path / "kv", tmp_path / "other"
    names = ("ours", "theirs", "damaged")
    prompts = {name: random_prompt(f"multi {name}", 1100) for name in names}

    def job(steps: list[dict[str, Any]]) -> Job:
        return Job(model, steps, store, second_store=other)

    without = engines.start(Job(model, [step("generate", prompts=prompts)]))
    files = 2 * chunks_in(prompts)
    steps = [
        step("generate", prompts=prompts),
        step("wait_for_chunks", "ours", directory=str(store), files=files),
        step("wait_for_chunks", "theirs", directory=str(other), files=files),
    ]
    cold, writer = engines.run(job(steps))
    plain = without.wait()["generate"]
    for name in ("ours", "damaged"):
        # Without the first chunk there is no hit.
        chunk_path(other, chunk_keys(writer, prompts[name])[0]).unlink()
    path = chunk_path(store, chunk_keys(writer, prompts["damaged"])[3], group=1)
    content = bytearray(path.read_bytes())
    content[8192] ^= 0x10
    path.write_bytes(content)
    warm, reader = engines.run(job([step("generate", prompts=prompts)]))
    assert_same_answers("cold", plain, cold["generate"])
    assert_same_answers("warm", plain, warm["generate"])
    for name in ("ours", "theirs"):
        assert moved(warm["generate"][name], HITS) == loadable_tokens(1100) == 4 * CHUNK_TOKENS
    assert assert_loaded_is_stored([writer], [reader]) > 0
    loaded = {record["key"] for record in reader.records("load") if not record["failed"]}
    for name in ("ours", "theirs"):
        assert loaded >= set(chunk_keys(writer, prompts[name])[:4])
    failed = [record["key"] for record in reader.records("load") if record["failed"]]
    assert failed == [path.stem]
