"""Every bad chunk is a miss: the request succeeds, the answer is right, the file is set aside."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy
from damage import DAMAGES
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    chunk_keys,
    chunk_path,
    moved,
    step,
)
from prompts import CHUNK_TOKENS, chunks_in, damage_prompts


@dataclass
class Damaged:
    """A directory of damaged chunks, and an engine that met them."""

    paths: dict[str, Path]
    good: dict[str, bytes]
    """The files before they were damaged."""
    writer: Running
    reader: Running
    healed: dict[str, Any]
    result: dict[str, Any]


def _values(chunk: bytes) -> numpy.ndarray[Any, Any]:
    """The KV in a chunk file, as the numbers that vLLM computed."""
    return safetensors.numpy.load(chunk)["kvcache"].view(numpy.float32)


@pytest.fixture(scope="module")
def damaged(engines: Engines, llama: Path, store: Path, tmp_path_factory: Any) -> Damaged:
    """Stores a prompt for each damage, does the damage, and asks again in a new engine."""
    prompts = damage_prompts()
    control = tmp_path_factory.mktemp("damage") / "control"
    steps = [
        step("generate", "cold", prompts=prompts, together=True),
        step("wait_for_chunks", directory=str(store), files=chunks_in(prompts)),
    ]
    _, writer = engines.run(Job(llama, steps, store))
    paths, good = {}, {}
    other = chunk_path(store, chunk_keys(writer, prompts["damage deleted after lookup"])[0])
    for name, damage in DAMAGES.items():
        key = chunk_keys(writer, prompts[f"damage {name}"])[damage.chunk]
        paths[name] = chunk_path(store, key)
        good[name] = paths[name].read_bytes()
        damage.apply(paths[name], other)
    deleted = "damage deleted after lookup"
    steps = [
        step("generate", "met", prompts={n: t for n, t in prompts.items() if n != deleted}),
        step("make_file", path=str(control), text="delete"),
        step("generate", "deleted", prompts={deleted: prompts[deleted]}),
        # Counters travel with engine steps, and stores take a moment.
        step("pause", seconds=1.0),
        step("generate", "later", prompts={"x": [1, 2, 3]}),
        step("metrics", "counters"),
    ]
    environment = {"E2E_CONTROL": str(control)}
    result, reader = engines.run(
        Job(llama, steps, store, environment=environment, without_override=True)
    )
    healed, _ = engines.run(Job(llama, [step("generate", "again", prompts=prompts)], store))
    result["met"] |= result["deleted"]
    return Damaged(paths, good, writer, reader, healed["again"], result)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_answer_is_right(damaged: Damaged, plain: dict[str, Any], name: str) -> None:
    answer = damaged.result["met"][f"damage {name}"]
    assert answer["finish_reason"] == "length"
    assert_same_answers(name, plain, {f"damage {name}": answer})


@pytest.mark.parametrize("name", DAMAGES)
def test_the_bad_chunk_is_not_loaded(damaged: Damaged, name: str) -> None:
    key = damaged.paths[name].stem
    loads = [record for record in damaged.reader.records("load") if record["key"] == key]
    assert all(record["failed"] for record in loads)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_counter_moves(damaged: Damaged, name: str) -> None:
    answer = damaged.result["met"][f"damage {name}"]
    failed = moved(answer, "kvrail:loads_failed_total")
    # What is no regular file may be told from a chunk by the lookup already.
    missed = moved(answer, "kvrail:miss_tokens_total")
    print(f"{name}: loads failed {failed:.0f}, tokens missed {missed:.0f}")
    assert failed >= 1 or missed >= CHUNK_TOKENS


@pytest.mark.parametrize("name", [name for name, damage in DAMAGES.items() if damage.leaves_file])
def test_the_bad_file_is_set_aside(damaged: Damaged, name: str) -> None:
    path = damaged.paths[name]
    namespace = path.parents[2]
    kept = [entry for entry in os.listdir(namespace / "quarantine") if path.name in entry]
    assert kept, "nothing of it is in quarantine"
    if os.path.lexists(path):
        assert path.is_file() and not path.is_symlink()
        # Computed anew, perhaps in another batch than the first time: the same numbers up to what
        # float32 keeps of a sum in another order.
        again, good = _values(path.read_bytes()), _values(damaged.good[name])
        numpy.testing.assert_allclose(again, good, rtol=1e-3, atol=1e-4)
        blank = numpy.zeros_like(good)
        assert not numpy.allclose(blank, good, rtol=1e-3, atol=1e-4), "the check is blind"


@pytest.mark.parametrize("name", DAMAGES)
def test_the_next_engine_finds_a_good_chunk(
    damaged: Damaged, plain: dict[str, Any], name: str
) -> None:
    prompt = f"damage {name}"
    answer = damaged.healed[prompt]
    assert_same_answers(name, plain, {prompt: answer})
    assert answer["cached_tokens"] == 2 * CHUNK_TOKENS
    assert moved(answer, "kvrail:loads_failed_total") == 0


def test_good_chunks_before_a_bad_one_are_loaded(damaged: Damaged) -> None:
    blocks = assert_loaded_is_stored([damaged.writer], [damaged.reader])
    behind_a_good_one = sum(damage.chunk for damage in DAMAGES.values())
    print(f"compared the bytes of {blocks} blocks")
    assert blocks >= 2 * behind_a_good_one


def test_vllms_default_policy_was_in_force(damaged: Damaged) -> None:
    job = damaged.reader.files.read_text()
    assert "kv_load_failure_policy" not in job and "load_failure_policy" not in job


def test_the_log_says_so_in_few_lines(damaged: Damaged) -> None:
    lines = [line for line in damaged.reader.log().splitlines() if " WARNING " in line]
    ours = [line for line in lines if "kvrail" in line]
    for line in ours:
        print(line)
    assert 1 <= len(ours) <= len(DAMAGES)
