"""Models with states in real vLLM: where they can go on, and with what.

A prompt can be gone on from at its last block boundary, and at those that vLLM is told to keep
states at (`--prefix-cache-retention-interval`): every other one here. A chunk is a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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
STEP_BLOCKS = 2


@dataclass(frozen=True)
class Shape:
    """A model with states, and how vLLM serves it."""

    make_config: Callable[[], Any]
    block_tokens: int
    """As vLLM chooses it, so that a page of KV is as large as a state."""
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def step_tokens(self) -> int:
        """The tokens of a step, and between two states."""
        return STEP_BLOCKS * self.block_tokens

    def boundaries(self, length: int) -> list[int]:
        """The numbers of tokens after which a prompt of this length has a state.

        Where steps end, and the last one from which a token is left to compute
        (vLLM's ``get_mamba_prefill_checkpoint_position``).
        """
        last = (length - 1) // self.block_tokens * self.block_tokens
        return sorted({*range(self.step_tokens, length + 1, self.step_tokens), last} - {0})

    def hit(self, length: int) -> int:
        """The tokens of a prompt that are loaded when it is asked again: one is computed."""
        return max((tokens for tokens in self.boundaries(length) if tokens < length), default=0)

    def prompts(self, names: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
        """A prompt of its own for each name: so many blocks, and so many tokens more."""
        return {
            name: random_prompt(f"states {name}", blocks * self.block_tokens + more)
            for name, (blocks, more) in names.items()
        }


SHAPES = {
    # Short convolutions: two tokens are the state.
    "LFM2": Shape(tiny_classes.lfm2, BLOCK_TOKENS),
    # Gated delta networks. Where steps are the same, so are the bits, in bfloat16 as well.
    "Qwen3-Next": Shape(tiny_classes.qwen3_next, BLOCK_TOKENS, {"dtype": "bfloat16"}),
}
MAIN = {"short": (0, 100), "boundary": (6, 0), "tail": (7, 92), "just behind": (7, 1)}
CHANGED = (7, 1)
"""What is computed behind a hit is the one token that sees the state."""
# One engine on each core: two that both use two would wait for each other.
CORES = tuple({"VLLM_CPU_OMP_THREADS_BIND": core} for core in "01")


@dataclass
class Seen:
    """What the model answered without kvrail, with an empty store, and after a restart."""

    shape: Shape
    main: dict[str, list[int]]
    store: Path
    state: int
    """The number of the group with the states."""
    plain: dict[str, Any]
    cold: dict[str, Any]
    writer: Running
    warm: dict[str, Any]
    reader: Running


@pytest.fixture(scope="module", params=list(SHAPES))
def seen(
    request: pytest.FixtureRequest, engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("states")
    store, control = folder / "kv", folder / "control"
    model = tiny_classes.build(shape.make_config, folder / "model")
    main = shape.prompts(MAIN)
    base = shape.prompts({"base": (7, 92)})
    # The same tokens up to somewhere behind the second state.
    begin = base["base"][: 2 * shape.step_tokens + 76]
    partly = {"partly": begin + random_prompt("states partly", 400)}
    stored = main | base | shape.prompts(dict.fromkeys([*CHANGES, "zero"], CHANGED))
    files = sum(
        len(tokens) // shape.block_tokens + len(shape.boundaries(len(tokens)))
        for tokens in stored.values()
    )

    def job(steps: list[dict[str, Any]], core: int, store: Path | None = None) -> Job:
        return Job(
            model,
            steps,
            store,
            settings={"chunk_size": shape.block_tokens},
            engine={
                "enable_prefix_caching": True,
                "max_num_batched_tokens": shape.step_tokens,
                "prefix_cache_retention_interval": shape.step_tokens,
            }
            | shape.engine,
            environment=CORES[core] | {"E2E_CONTROL": str(control)},
        )

    without = engines.start(job([step("generate", prompts=stored | partly)], 0))
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
        change(shape, store, state, chunk_keys(writer, stored[name], blocks=1))
    changed = {name: stored[name] for name in CHANGES}
    steps = [
        step("generate", "warm", prompts=main),
        step("generate", "partly", prompts=partly),
        step("generate", "changed", prompts=changed),
    ]
    warm, reader = engines.run(job(steps, 1, store))
    control.write_text(f"zero {state}")
    steps = [step("generate", "spoilt", prompts={"zero": stored["zero"]})]
    spoilt, _ = engines.run(job(steps, 1, store))
    warm |= spoilt
    return Seen(
        shape, main, store, state, plain["generate"], cold["generate"], writer, warm, reader
    )


def _lose_last_state(shape: Shape, store: Path, state: int, keys: list[str]) -> None:
    chunk_path(store, keys[CHANGED[0] - 1], group=state).unlink()


def _lose_all_states(shape: Shape, store: Path, state: int, keys: list[str]) -> None:
    for tokens in shape.boundaries(CHANGED[0] * shape.block_tokens + CHANGED[1]):
        chunk_path(store, keys[tokens // shape.block_tokens - 1], group=state).unlink()


def _damage_state(shape: Shape, store: Path, state: int, keys: list[str]) -> None:
    path = chunk_path(store, keys[CHANGED[0] - 1], group=state)
    content = bytearray(path.read_bytes())
    content[4096] ^= 0x10
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Shape, Path, int, list[str]], None]] = {
    "last gone": _lose_last_state,
    "all gone": _lose_all_states,
    "damaged": _damage_state,
}


def test_states_are_stored_where_vllm_has_them(seen: Seen) -> None:
    block_tokens = seen.shape.block_tokens
    for name, tokens in seen.main.items():
        keys = chunk_keys(seen.writer, tokens, blocks=1)
        records = [r for r in seen.writer.records("store") if r["key"] in keys]
        ends = sorted(
            (keys.index(record["key"]) + 1) * block_tokens
            for record in records
            if record["group"] == seen.state
        )
        print(f"{name}: {len(tokens)} tokens, states after {ends}")
        assert ends == seen.shape.boundaries(len(tokens))
        assert len(records) - len(ends) == len(tokens) // block_tokens


def test_answers_are_those_without_kvrail(seen: Seen) -> None:
    assert_same_answers("cold", seen.plain, seen.cold)
    for name in ("warm", "partly", "changed"):
        assert_same_answers(name, seen.plain, seen.warm[name])


def test_a_restarted_vllm_goes_on_from_the_last_state(seen: Seen) -> None:
    for name, tokens in seen.main.items():
        assert moved(seen.cold[name], HITS) == 0
        assert moved(seen.warm["warm"][name], HITS) == seen.shape.hit(len(tokens)), name
    assert moved(seen.warm["partly"]["partly"], HITS) == 2 * seen.shape.step_tokens


def test_what_was_loaded_is_what_was_stored(seen: Seen) -> None:
    blocks = assert_loaded_is_stored([seen.writer, seen.reader], [seen.reader])
    states = [r for r in seen.reader.records("load") if r["group"] == seen.state]
    print(f"compared the bytes of {blocks} blocks, {len(states)} of them states")
    assert len(states) >= len(MAIN) - 1
    assert blocks > len(states)


def test_a_hit_ends_where_there_is_a_state(seen: Seen) -> None:
    changed = {name: moved(answer, HITS) for name, answer in seen.warm["changed"].items()}
    print(changed)
    assert changed["last gone"] == 3 * seen.shape.step_tokens
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
