"""kvrail beside another connector, under vLLM's `MultiConnector`."""

from pathlib import Path
from typing import Any

import pytest
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
from prompts import CHUNK_TOKENS, chunks_in, loadable_tokens, main_prompts, random_prompt

HITS = "vllm:external_prefix_cache_hits_total"
# Without this vLLM asks for a NUMA node for each rank.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


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


@pytest.mark.parametrize(("ranks", "comes_first"), [(1, True), (2, False)])
def test_each_connector_hears_its_own_workers_only(
    engines: Engines,
    llama: Path,
    plain: dict[str, Any],
    tmp_path: Path,
    ranks: int,
    comes_first: bool,
) -> None:
    """vLLM gives what the first one's workers say at the start to all connectors."""
    store = tmp_path / "kv"
    prompts = {name: main_prompts()[name] for name in ("boundary", "tail")}

    def job(*steps: dict[str, Any]) -> Job:
        made = Job(llama, list(steps), store, environment=CORES if ranks > 1 else {})
        ours = made.as_json(tmp_path / "x")["engine"]["kv_transfer_config"]
        strict = {
            "kv_connector": "StrictConnector",
            "kv_connector_module_path": "strict_connector",
            "kv_role": "kv_both",
        }
        inner = [ours, strict] if comes_first else [strict, ours]
        made.engine = {
            "tensor_parallel_size": ranks,
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"connectors": inner},
            },
        }
        return made

    files = ranks * chunks_in(prompts)
    cold, _ = engines.run(
        job(
            step("generate", prompts=prompts),
            step("wait_for_chunks", directory=str(store), files=files),
        )
    )
    # The first request of a restarted engine: it waits for the workers to say what they have.
    warm, _ = engines.run(job(step("generate", prompts=prompts)))
    assert_same_answers("cold", plain, cold["generate"])
    assert_same_answers("warm", plain, warm["generate"])
    for name, answer in warm["generate"].items():
        assert moved(answer, HITS) == loadable_tokens(len(prompts[name])), name


def test_what_another_failed_to_load_is_not_stored(
    engines: Engines, llama: Path, tmp_path: Path
) -> None:
    """vLLM computes on the other's rubbish first, and learns of it with the step's output.

    One prompt begins with another, and with the blocks that vLLM believes to be loaded for that.
    """
    store = tmp_path / "kv"
    prompts = {name: main_prompts()[name] for name in ("boundary", "tail", "long")}
    prompts["shared"] = prompts["boundary"] + random_prompt("failing shared", 400)
    generate = step("generate", prompts=prompts, together=True)
    # The chunks of "boundary" are those of "shared", too.
    files = chunks_in(prompts) - 3
    failing = Job(
        llama, [generate, step("wait_for_chunks", directory=str(store), files=files)], store
    )
    ours = failing.as_json(tmp_path / "x")["engine"]["kv_transfer_config"]
    theirs = {
        "kv_connector": "FailingConnector",
        "kv_connector_module_path": "failing_connector",
        "kv_role": "kv_both",
    }
    failing.engine = {
        "async_scheduling": True,
        "enable_prefix_caching": True,
        "kv_transfer_config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [theirs, ours]},
        },
    }
    without = engines.start(Job(llama, [generate]))
    cold, writer = engines.run(failing)
    plain = without.wait()["generate"]
    assert "KV load failure" in writer.log(), "nothing failed"
    warm, reader = engines.run(Job(llama, [generate], store))
    assert_same_answers("cold", plain, cold["generate"])
    assert_same_answers("warm", plain, warm["generate"])
    assert assert_loaded_is_stored([writer], [reader]) > 0
