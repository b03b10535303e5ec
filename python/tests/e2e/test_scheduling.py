"""Requests that are preempted or aborted leave right answers and right chunks."""

from pathlib import Path
from typing import Any

from harness import Engines, Job, assert_loaded_is_stored, assert_same_answers, step
from prompts import (
    BLOCK_TOKENS,
    CROWD_TOKENS,
    abort_prompts,
    chunks_in,
    crowd_prompts,
    loadable_tokens,
)


def test_preempted_requests(
    engines: Engines, llama: Path, plain: dict[str, Any], store: Path
) -> None:
    """Room for the prompts of four requests, each of which grows by a block while it decodes."""
    prompts = crowd_prompts()
    crowd = {"prompts": prompts, "max_tokens": CROWD_TOKENS, "together": True}
    steps = [
        step("generate", "cold", **crowd),
        step("wait_for_chunks", directory=str(store), files=chunks_in(prompts)),
        step("reset_prefix_cache"),
        step("metrics", "between"),
        step("generate", "warm", **crowd),
        step("metrics", "end"),
    ]
    blocks = 4 * -(-600 // BLOCK_TOKENS) + 1
    engine = {
        "enable_prefix_caching": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": blocks,
    }
    result, running = engines.run(Job(llama, steps, store, engine=engine))
    counter = "vllm:num_preemptions_total"
    cold = result["between"][counter]
    warm = result["end"][counter] - cold
    print(f"preemptions: {cold:.0f} cold, {warm:.0f} warm")
    assert cold >= 1 and warm >= 1
    assert_same_answers("cold", plain, result["cold"])
    assert_same_answers("warm", plain, result["warm"])
    loaded = assert_loaded_is_stored([running], [running])
    assert loaded >= len(prompts) * loadable_tokens(600) // BLOCK_TOKENS


def test_aborted_requests(
    engines: Engines, llama: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    """Aborts in the midst of prefill and stores, then in the midst of loads."""
    store = tmp_path / "kv"
    prompts = abort_prompts()
    gone = {name: tokens for name, tokens in prompts.items() if "gone" in name}
    kept = {name: tokens for name, tokens in prompts.items() if "kept" in name}
    steps = [step("abort", "prefill", aborted=gone, kept=kept, steps=4)]
    steps += [
        step("generate", "whole", prompts=prompts, together=True),
        step("wait_for_chunks", directory=str(store), files=chunks_in(prompts)),
    ]
    for count in (1, 2, 3):
        steps.append(step("reset_prefix_cache", f"reset {count}"))
        steps.append(step("abort", f"load {count}", aborted=gone, kept=kept, steps=count))
    steps += [step("reset_prefix_cache"), step("generate", "after", prompts=prompts)]
    engine = {"enable_prefix_caching": True}
    result, running = engines.run(Job(llama, steps, store, engine=engine))
    for name in ("prefill", "load 1", "load 2", "load 3"):
        print(f"{name}: {len(result[name]['aborted'])} requests aborted")
        assert_same_answers(name, plain, result[name]["answers"])
    assert len(result["prefill"]["aborted"]) == len(gone)
    assert any(result[f"load {count}"]["aborted"] for count in (1, 2, 3))
    assert_same_answers("whole", plain, result["whole"])
    assert_same_answers("after", plain, result["after"])
    for name, answer in result["after"].items():
        assert answer["cached_tokens"] == loadable_tokens(len(prompts[name])), name
    print(f"compared the bytes of {assert_loaded_is_stored([running], [running])} blocks")
