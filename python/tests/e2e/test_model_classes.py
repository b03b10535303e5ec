"""Models of several architectures, each as vLLM itself cuts it into KV cache groups."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_classes
import tiny_model
import torch
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    moved,
    step,
)
from prompts import CHUNK_TOKENS, loadable_tokens, random_prompt

HITS = "vllm:external_prefix_cache_hits_total"
DRAFTS = "vllm:spec_decode_num_draft_tokens_total"
PROMPTS = {name: random_prompt(f"classes {name}", 1500) for name in ("long", "other")} | {
    "boundary": random_prompt("classes boundary", 3 * CHUNK_TOKENS)
}
CHUNKS = 5 + 5 + 3
# One engine on each core: two that both use two would wait for each other.
CORES = tuple({"VLLM_CPU_OMP_THREADS_BIND": core} for core in "01")


@dataclass(frozen=True)
class Case:
    """A model, how vLLM serves it, and the chunk files that a store then holds."""

    build: Callable[[Path], Path]
    groups: int
    files: int
    engine: dict[str, Any] = field(default_factory=dict)
    draft: Callable[[Path], Path] | None = None
    """What builds the model that drafts, where there is one."""


def _of(make_config: Callable[[], Any]) -> Callable[[Path], Path]:
    return lambda folder: tiny_classes.build(make_config, folder)


CASES = {
    # The model magnifies rounding: two ways to cut a prompt into steps differ by 1e-3 without
    # kvrail. Steps of one chunk are the same steps with and without a hit.
    "Gemma 3n": Case(
        _of(tiny_classes.gemma3n), 5, 5 * CHUNKS, {"max_num_batched_tokens": CHUNK_TOKENS}
    ),
    "Gemma 3": Case(_of(tiny_classes.gemma3), 6, 6 * CHUNKS),
    "gpt-oss": Case(_of(tiny_classes.gpt_oss), 2, 2 * CHUNKS),
    # Of the chunks of a group with segments every other one is at the end of a segment.
    "Llama 4": Case(_of(tiny_classes.llama4), 4, CHUNKS + 3 * (3 + 3 + 2)),
    "MiniCPM3": Case(_of(tiny_classes.minicpm3), 1, CHUNKS),
    "Mixtral": Case(_of(tiny_classes.mixtral), 1, CHUNKS),
    "n-gram drafts": Case(
        tiny_model.build_llama,
        1,
        CHUNKS,
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_min": 1,
                "prompt_lookup_max": 3,
            }
        },
    ),
    "fp8 KV cache": Case(tiny_model.build_llama, 1, CHUNKS, {"kv_cache_dtype": "fp8"}),
    # The layer of the head is one more of the group, with blocks of its own.
    "EAGLE drafts": Case(
        tiny_model.build_llama,
        1,
        CHUNKS,
        {"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}},
        tiny_model.build_eagle_head,
    ),
    # So is the layer for drafts that comes with the model.
    "MTP drafts": Case(
        tiny_classes.build_ernie_mtp,
        1,
        CHUNKS,
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
    ),
}


def _run_both(
    engines: Engines, job: Job, with_store: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], Running]:
    """Runs the model without kvrail and, at the same time, with an empty store."""
    steps = [step("generate", prompts=PROMPTS)]
    without = engines.start(Job(job.model, steps, engine=job.engine, environment=CORES[0]))
    job.steps, job.environment = steps + with_store, job.environment | CORES[1]
    cold, writer = engines.run(job)
    return without.wait()["generate"], cold, writer


@pytest.mark.parametrize("name", CASES)
def test_answers_of_a_restarted_vllm(name: str, engines: Engines, tmp_path: Path) -> None:
    case, store, control = CASES[name], tmp_path / "kv", tmp_path / "control"
    if "kv_cache_dtype" in case.engine and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's CPU build keeps fp8 on processors with AVX-512 only")
    job = Job(case.build(tmp_path / "model"), [], store, engine=dict(case.engine))
    if case.draft is not None:
        head = {"model": str(case.draft(tmp_path / "draft"))}
        job.engine["speculative_config"] = case.engine["speculative_config"] | head
    spoil = [
        step("wait_for_chunks", directory=str(store), files=case.files),
        step("make_file", path=str(control), text="zero"),
        step("generate", "spoilt", prompts={"other": PROMPTS["other"]}),
    ]
    job.environment = {"E2E_CONTROL": str(control)}
    plain, cold, writer = _run_both(engines, job, spoil)
    assert len(cold["wait_for_chunks"]) == case.files
    assert {record["group"] for record in writer.records("store")} == set(range(case.groups))
    job.steps, job.environment = [step("generate", prompts=PROMPTS)], CORES[1]
    warm, reader = engines.run(job)
    for prompt, tokens in PROMPTS.items():
        assert moved(cold["generate"][prompt], HITS) == 0
        assert moved(warm["generate"][prompt], HITS) == loadable_tokens(len(tokens))
    assert_same_answers("cold", plain, cold["generate"])
    assert_same_answers("warm", plain, warm["generate"])
    print(f"compared the bytes of {assert_loaded_is_stored([writer], [reader])} blocks")
    if "speculative_config" in case.engine:
        assert moved(warm["generate"]["long"], DRAFTS) > 0
    # A block of nothing is seen: the model looks at what was loaded.
    with pytest.raises((AssertionError, KeyError)):
        assert_same_answers("spoilt", plain, cold["spoilt"])


def test_a_model_with_a_state_is_served_without_kvrail(engines: Engines, tmp_path: Path) -> None:
    model = tiny_classes.build(tiny_classes.falcon_h1, tmp_path / "model")
    again = step("generate", "again", prompts=PROMPTS)
    plain, cold, writer = _run_both(engines, Job(model, [], tmp_path / "kv"), [again])
    assert "nothing is stored or loaded: KV cache group 1 is MambaSpec" in writer.log()
    assert_same_answers("with kvrail", plain, cold["generate"])
    assert_same_answers("again", plain, cold["again"])
    assert all(moved(answer, HITS) == 0 for answer in cold["again"].values())
    assert not list(tmp_path.glob("kv/**/*.safetensors"))
