"""A model with states (LFM2: short convolutions) in real vLLM: where it can go on, and with what.

Its prompts can be gone on from at their last block boundary, and at those that vLLM is told to keep
states at (`--prefix-cache-retention-interval`): every fourth here. A chunk is a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_classes
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
from prompts import BLOCK_TOKENS, random_prompt

HITS = "vllm:external_prefix_cache_hits_total"
STEP_TOKENS = 4 * BLOCK_TOKENS
LENGTHS = {"short": 100, "boundary": 768, "tail": 1500, "just behind": 1409}
CHANGED_LENGTH = 1409
"""What is computed behind a hit is the one token that sees the state."""
# One engine on each core: two that both use two would wait for each other.
CORES = tuple({"VLLM_CPU_OMP_THREADS_BIND": core} for core in "01")


def boundaries(length: int) -> list[int]:
    """The numbers of tokens after which a prompt of this length has a state.

    The last is one from which a token is left to compute
    (vLLM's ``get_mamba_prefill_checkpoint_position``).
    """
    last = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    return sorted({*range(STEP_TOKENS, last, STEP_TOKENS), last} - {0})


def hit(length: int) -> int:
    """The tokens of a prompt that are loaded when it is asked again."""
    return max(boundaries(length), default=0)


def prompts_of(names: dict[str, int]) -> dict[str, list[int]]:
    """A prompt of its own for each name, of its length."""
    return {name: random_prompt(f"states {name}", length) for name, length in names.items()}


@dataclass
class Seen:
    """What the model answered without kvrail, with an empty store, and after a restart."""

    store: Path
    state: int
    """The number of the group with the states."""
    plain: dict[str, Any]
    cold: dict[str, Any]
    writer: Running
    warm: dict[str, Any]
    reader: Running


MAIN = prompts_of(LENGTHS)
BASE = prompts_of({"base": 1500})
# The same tokens up to somewhere behind the second state.
PARTLY = {"partly": BASE["base"][:1100] + random_prompt("states partly", 400)}


@pytest.fixture(scope="module")
def seen(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("states")
    store, control = folder / "kv", folder / "control"
    model = tiny_classes.build(tiny_classes.lfm2, folder / "model")
    stored = MAIN | BASE | prompts_of(dict.fromkeys([*CHANGES, "zero"], CHANGED_LENGTH))
    files = sum(
        len(tokens) // BLOCK_TOKENS + len(boundaries(len(tokens))) for tokens in stored.values()
    )

    def job(steps: list[dict[str, Any]], core: int, store: Path | None = None) -> Job:
        return Job(
            model,
            steps,
            store,
            settings={"chunk_size": BLOCK_TOKENS},
            engine={
                "enable_prefix_caching": True,
                "max_num_batched_tokens": STEP_TOKENS,
                "prefix_cache_retention_interval": STEP_TOKENS,
            },
            environment=CORES[core] | {"E2E_CONTROL": str(control)},
        )

    without = engines.start(job([step("generate", prompts=stored | PARTLY)], 0))
    steps = [
        step("generate", prompts=stored),
        step("wait_for_chunks", directory=str(store), files=files),
    ]
    cold, writer = engines.run(job(steps, 1, store))
    assert len(cold["wait_for_chunks"]) == files
    plain = without.wait()
    counts = {
        group: len({r["key"] for r in writer.records("store") if r["group"] == group})
        for group in (0, 1)
    }
    state = min(counts, key=lambda group: counts[group])
    for name, change in CHANGES.items():
        change(store, state, chunk_keys(writer, stored[name], blocks=1))
    changed = {name: stored[name] for name in CHANGES}
    steps = [
        step("generate", "warm", prompts=MAIN),
        step("generate", "partly", prompts=PARTLY),
        step("generate", "changed", prompts=changed),
    ]
    warm, reader = engines.run(job(steps, 1, store))
    control.write_text(f"zero {state}")
    steps = [step("generate", "spoilt", prompts={"zero": stored["zero"]})]
    spoilt, _ = engines.run(job(steps, 1, store))
    warm |= spoilt
    return Seen(store, state, plain["generate"], cold["generate"], writer, warm, reader)


def _lose_last_state(store: Path, state: int, keys: list[str]) -> None:
    chunk_path(store, keys[10], group=state).unlink()


def _lose_all_states(store: Path, state: int, keys: list[str]) -> None:
    for tokens in boundaries(CHANGED_LENGTH):
        chunk_path(store, keys[tokens // BLOCK_TOKENS - 1], group=state).unlink()


def _damage_state(store: Path, state: int, keys: list[str]) -> None:
    path = chunk_path(store, keys[10], group=state)
    content = bytearray(path.read_bytes())
    content[4096] ^= 0x10
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Path, int, list[str]], None]] = {
    "last gone": _lose_last_state,
    "all gone": _lose_all_states,
    "damaged": _damage_state,
}


def test_states_are_stored_where_vllm_has_them(seen: Seen) -> None:
    for name, tokens in MAIN.items():
        keys = chunk_keys(seen.writer, tokens, blocks=1)
        records = [r for r in seen.writer.records("store") if r["key"] in keys]
        ends = sorted(
            (keys.index(record["key"]) + 1) * BLOCK_TOKENS
            for record in records
            if record["group"] == seen.state
        )
        print(f"{name}: {len(tokens)} tokens, states after {ends}")
        assert ends == boundaries(len(tokens))
        assert len(records) - len(ends) == len(tokens) // BLOCK_TOKENS


def test_answers_are_those_without_kvrail(seen: Seen) -> None:
    assert_same_answers("cold", seen.plain, seen.cold)
    for name in ("warm", "partly", "changed"):
        assert_same_answers(name, seen.plain, seen.warm[name])


def test_a_restarted_vllm_goes_on_from_the_last_state(seen: Seen) -> None:
    for name, length in LENGTHS.items():
        assert moved(seen.cold[name], HITS) == 0
        assert moved(seen.warm["warm"][name], HITS) == hit(length), name
    assert moved(seen.warm["partly"]["partly"], HITS) == 2 * STEP_TOKENS


def test_what_was_loaded_is_what_was_stored(seen: Seen) -> None:
    blocks = assert_loaded_is_stored([seen.writer, seen.reader], [seen.reader])
    states = [r for r in seen.reader.records("load") if r["group"] == seen.state]
    print(f"compared the bytes of {blocks} blocks, {len(states)} of them states")
    assert len(states) >= len(LENGTHS) - 1
    assert blocks > len(states)


def test_a_hit_ends_where_there_is_a_state(seen: Seen) -> None:
    changed = {name: moved(answer, HITS) for name, answer in seen.warm["changed"].items()}
    print(changed)
    assert changed["last gone"] == 2 * STEP_TOKENS
    assert changed["all gone"] == 0


def test_a_damaged_state_is_computed(seen: Seen) -> None:
    failed = [record for record in seen.reader.records("load") if record["failed"]]
    assert [record["group"] for record in failed] == [seen.state]
    aside = [path.name for path in seen.store.glob("*/quarantine/**/*") if path.is_file()]
    print(aside)
    assert any(failed[0]["key"] in name for name in aside)


def test_a_state_of_nothing_is_seen(seen: Seen) -> None:
    with pytest.raises((AssertionError, KeyError)):
        assert_same_answers("spoilt", seen.plain, seen.warm["spoilt"])
