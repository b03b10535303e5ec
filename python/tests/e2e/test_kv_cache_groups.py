"""Models whose layers do not all see all tokens: what a hit needs of each KV cache group."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    chunk_keys,
    chunk_path,
    difference,
    moved,
    step,
)
from prompts import BLOCK_TOKENS, CHUNK_TOKENS, loadable_tokens, random_prompt

HITS = "vllm:external_prefix_cache_hits_total"
FULL, WINDOW = False, True


@dataclass(frozen=True)
class Shape:
    """A model, and what its chunks are like."""

    layers: tuple[bool, ...]
    window: int
    groups: int
    """KV cache groups that vLLM makes of the layers: as many layers in each."""
    windowed: tuple[int, ...]
    """Which of them have a window."""

    @property
    def kept_blocks(self) -> int:
        """Blocks in a file of a group with a window."""
        blocks = -(-(self.window - 1) // BLOCK_TOKENS)
        return min(blocks, CHUNK_TOKENS // BLOCK_TOKENS)

    @property
    def needed_chunks(self) -> int:
        """Chunks that a hit needs of a group with a window."""
        return -(-(self.window - 1) // CHUNK_TOKENS)


SHAPES = {
    # All layers alike: one group, whose window is a chunk's tokens.
    "windows only": Shape((WINDOW,) * 4, 256, 1, (0,)),
    # A window of less than a block: one block of each chunk is kept.
    "small window": Shape((FULL, WINDOW, FULL, WINDOW), 100, 2, (1,)),
    # As Gemma and gpt-oss mix them; the window begins in the middle of a chunk.
    "one full of four": Shape((WINDOW, WINDOW, WINDOW, FULL), 600, 4, (0, 1, 2)),
}
LENGTHS = {"short": 100, "boundary": 3 * CHUNK_TOKENS, "tail": 700, "long": 3500}


def all_prompts() -> dict[str, list[int]]:
    """One prompt of each length, and one for each thing that is done to chunks."""
    made = {name: random_prompt(f"groups {name}", length) for name, length in LENGTHS.items()}
    return made | {name: random_prompt(f"groups {name}", 1500) for name in CHANGES}


@dataclass
class Seen:
    """What a model answered without kvrail, with an empty store, and after a restart."""

    shape: Shape
    store: Path
    prompts: dict[str, list[int]]
    plain: dict[str, Any]
    cold: dict[str, Any]
    writer: Running
    warm: dict[str, Any]
    reader: Running


@pytest.fixture(scope="module", params=list(SHAPES))
def seen(
    request: pytest.FixtureRequest, engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """Runs a model without kvrail, at the same time with an empty store, then with that store."""
    shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("groups")
    model = tiny_model.build_mixed(folder / "model", shape.layers, shape.window)
    store = folder / "kv"
    prompts = all_prompts()
    longer = {
        f"{name} and more": prompts[name] + random_prompt(f"groups {name} more", 400)
        for name in ("boundary", "long")
    }
    without = engines.start(Job(model, [step("generate", prompts=prompts | longer)]))
    chunks = sum(len(tokens) // CHUNK_TOKENS for tokens in prompts.values())
    steps = [
        step("generate", prompts=prompts),
        step("wait_for_chunks", directory=str(store), files=shape.groups * chunks),
    ]
    cold, writer = engines.run(Job(model, steps, store))
    plain = without.wait()
    for name, change in CHANGES.items():
        change(shape, store, chunk_keys(writer, prompts[name]))
    changed = {name: prompts[name] for name in CHANGES}
    steps = [
        step("generate", "warm", prompts={name: prompts[name] for name in LENGTHS}),
        step("generate", "longer", prompts=longer),
        step("generate", "changed", prompts=changed),
        step("generate", "again", prompts=changed),
    ]
    warm, reader = engines.run(Job(model, steps, store))
    return Seen(shape, store, prompts, plain["generate"], cold["generate"], writer, warm, reader)


Change = Callable[[Shape, Path, list[str]], None]


def _lose_last(shape: Shape, store: Path, keys: list[str]) -> None:
    """The last chunk of the last group with a window is gone."""
    chunk_path(store, keys[4], group=shape.windowed[-1]).unlink()


def _lose_one_between(shape: Shape, store: Path, keys: list[str]) -> None:
    """A chunk that only later boundaries than the second do not need any more is gone."""
    chunk_path(store, keys[1], group=shape.windowed[0]).unlink()


def _damage(shape: Shape, store: Path, keys: list[str]) -> None:
    """A chunk that is found but cannot be loaded: a bit of its content is another."""
    path = chunk_path(store, keys[4], group=shape.windowed[-1])
    content = bytearray(path.read_bytes())
    content[8192] ^= 0x10
    path.write_bytes(content)


CHANGES: dict[str, Change] = {"gone": _lose_last, "gap": _lose_one_between, "damaged": _damage}


def test_each_group_has_files_of_its_own(seen: Seen) -> None:
    for group in range(seen.shape.groups):
        records = [r for r in seen.writer.records("store") if r["group"] == group]
        blocks = {len(record["blocks"]) for record in records}
        kept = seen.shape.kept_blocks if group in seen.shape.windowed else 2
        print(f"group {group}: {len(records)} chunks of {blocks} blocks")
        assert blocks == {kept}
        assert len(records) == len({record["key"] for record in records})


def test_answers_are_those_without_kvrail(seen: Seen) -> None:
    assert_same_answers("cold", seen.plain, seen.cold)
    for name in ("warm", "longer", "changed", "again"):
        assert_same_answers(name, seen.plain, seen.warm[name])


def test_a_restarted_vllm_takes_all_whole_chunks(seen: Seen) -> None:
    for name, length in LENGTHS.items():
        assert moved(seen.cold[name], HITS) == 0
        assert moved(seen.warm["warm"][name], HITS) == loadable_tokens(length), name
    assert moved(seen.warm["longer"]["boundary and more"], HITS) == LENGTHS["boundary"]
    assert moved(seen.warm["longer"]["long and more"], HITS) == 3328


def test_no_more_is_loaded_than_the_windows_see(seen: Seen) -> None:
    shape = seen.shape
    keys = chunk_keys(seen.reader, seen.prompts["long"])
    hit = loadable_tokens(LENGTHS["long"])
    for group in range(shape.groups):
        loads = [r for r in seen.reader.records("load") if r["group"] == group]
        loads = [r for r in loads if r["key"] in keys]
        # The prompt was asked twice, the second time with more behind it.
        loads = loads[: len(loads) // 2]
        blocks = sum(len(record["blocks"]) for record in loads)
        windowed = group in shape.windowed
        needed = -(-(shape.window - 1) // BLOCK_TOKENS) if windowed else hit // BLOCK_TOKENS
        chunks = shape.needed_chunks if windowed else hit // CHUNK_TOKENS
        print(f"group {group}: {blocks} blocks of {len(loads)} chunks for {hit} tokens")
        assert (blocks, len(loads)) == (needed, chunks)


def test_what_was_loaded_is_what_was_stored(seen: Seen) -> None:
    blocks = assert_loaded_is_stored([seen.writer, seen.reader], [seen.reader])
    print(f"compared the bytes of {blocks} blocks")
    assert blocks > 0


def test_a_hit_ends_where_each_group_can_go_on(seen: Seen) -> None:
    """Of five whole chunks, the boundaries that need the chunk that is gone are no hits."""
    changed = {name: moved(answer, HITS) for name, answer in seen.warm["changed"].items()}
    needed = seen.shape.needed_chunks
    print(changed)
    assert changed["gone"] == 4 * CHUNK_TOKENS
    # At the end of the fifth chunk the second one is out of sight.
    assert needed <= 3
    assert changed["gap"] == 5 * CHUNK_TOKENS
    again = {name: moved(answer, HITS) for name, answer in seen.warm["again"].items()}
    assert again["gone"] == 5 * CHUNK_TOKENS, "what was missing was stored again"


def test_a_damaged_chunk_of_one_group_is_computed(seen: Seen) -> None:
    failed = [record for record in seen.reader.records("load") if record["failed"]]
    key = chunk_keys(seen.writer, seen.prompts["damaged"])[4]
    assert [(r["group"], r["key"]) for r in failed] == [(seen.shape.windowed[-1], key)]
    aside = [path.name for path in seen.store.glob("*/quarantine/**/*") if path.is_file()]
    print(aside)
    assert any(key in name for name in aside)


def test_the_models_notice_a_wrong_block(seen: Seen) -> None:
    """The answers differ from those of other prompts by far more than the bound of equality."""
    one, other = seen.plain["gone"], seen.plain["gap"]
    assert one["tokens"] != other["tokens"]
    with pytest.raises(AssertionError):
        difference(one, other, 1e-3)
