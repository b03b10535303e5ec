"""Where a request can go on whose KV cache groups look back differently far."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from kvrail._core import WaitTimeoutError
from kvrail.vllm.boundary import BoundaryTicket, last_boundary
from kvrail.vllm.geometry import GroupGeometry

BLOCK, CHUNK = 16, 64


class Ticket:
    """An answer that takes some polls; a wait takes it at once."""

    def __init__(self, value, polls: int, waits_for_ever: bool = False) -> None:
        self.value = value
        self.polls = polls
        self.waits_for_ever = waits_for_ever

    def poll(self):
        self.polls -= 1
        return self.value if self.polls < 0 and not self.waits_for_ever else None

    def wait(self, limit_seconds: float):
        if self.waits_for_ever:
            raise WaitTimeoutError("still looking")
        self.polls = 0
        return self.value


class Store:
    """Chunks present by group, and what was asked."""

    def __init__(self, present: dict[int, set[bytes]], chance: random.Random | None = None) -> None:
        self.present = present
        self.chance = chance
        self.asked: list[tuple[str, int, int]] = []

    def _ticket(self, value) -> Ticket:
        return Ticket(value, self.chance.randrange(3) if self.chance else 0)

    def prefix(self, keys: Sequence[bytes], group: int) -> Ticket:
        self.asked.append(("prefix", group, len(keys)))
        missing = (i for i, key in enumerate(keys) if key not in self.present[group])
        return self._ticket(next(missing, len(keys)))

    def each(self, keys: Sequence[bytes], group: int) -> Ticket:
        self.asked.append(("each", group, len(keys)))
        return self._ticket([key in self.present[group] for key in keys])


def keys(count: int) -> list[bytes]:
    return [index.to_bytes(8, "big") for index in range(count)]


def brute_force(groups: Sequence[GroupGeometry], present: dict[int, set[bytes]], count: int) -> int:
    """The definition: a boundary holds when each group has all chunks that it needs there."""
    names = keys(count)
    for boundary in range(count, 0, -1):
        if all(
            names[chunk] in present[group.index]
            for group in groups
            for chunk in range(boundary)
            if (chunk + 1) * CHUNK > group.needed_from(boundary * CHUNK)
        ):
            return boundary
    return 0


def some_groups(chance: random.Random) -> list[GroupGeometry]:
    def one(index: int) -> GroupGeometry:
        kind = chance.choice(["whole", "window", "segment"])
        if kind == "window":
            look_back = chance.choice([1, 15, 16, 17, 63, 64, 65, 200, 1000])
            return GroupGeometry(index, BLOCK, CHUNK, look_back=look_back)
        if kind == "segment":
            return GroupGeometry(index, BLOCK, CHUNK, segment=chance.choice([64, 128, 256]))
        return GroupGeometry(index, BLOCK, CHUNK)

    return [one(index) for index in range(chance.randint(1, 4))]


@pytest.mark.parametrize("seed", range(300))
def test_the_answer_is_the_last_boundary_that_holds(seed):
    chance = random.Random(seed)
    groups = some_groups(chance)
    count = chance.randint(0, 24)
    share = chance.choice([0.0, 0.5, 0.9, 1.0])
    present = {
        group.index: {key for key in keys(count) if chance.random() < share} for group in groups
    }
    store = Store(present, chance)
    ticket = BoundaryTicket(store.prefix, store.each, groups, keys(count))
    while chance.random() < 0.5:
        ticket.poll()
    assert ticket.wait(10.0) == ticket.poll() == brute_force(groups, present, count)


def test_a_prompt_that_is_there_takes_two_short_questions():
    groups = [GroupGeometry(0, BLOCK, CHUNK), GroupGeometry(1, BLOCK, CHUNK, look_back=127)]
    store = Store({0: set(keys(512)), 1: set(keys(512))})
    ticket = BoundaryTicket(store.prefix, store.each, groups, keys(512))
    assert store.asked == [("prefix", 0, 512)], "asked when it is made, and not waited for"
    assert ticket.wait(1.0) == 512
    assert store.asked == [("prefix", 0, 512), ("prefix", 1, 2)]


def test_a_prompt_that_is_new_takes_one_question():
    groups = [GroupGeometry(0, BLOCK, CHUNK), GroupGeometry(1, BLOCK, CHUNK, look_back=127)]
    store = Store({0: set(), 1: set()})
    assert BoundaryTicket(store.prefix, store.each, groups, keys(512)).wait(1.0) == 0
    assert store.asked == [("prefix", 0, 512)]


def test_a_wait_is_bounded():
    groups = [GroupGeometry(0, BLOCK, CHUNK), GroupGeometry(1, BLOCK, CHUNK, look_back=127)]
    never = Ticket(None, 0, waits_for_ever=True)
    ticket = BoundaryTicket(lambda *_: never, lambda *_: never, groups, keys(3))
    assert ticket.poll() is None
    with pytest.raises(WaitTimeoutError):
        ticket.wait(0.01)


def test_an_answer_that_comes_while_it_is_looked_for_is_taken():
    """Between two looks at the same ticket its answer may arrive."""
    groups = [GroupGeometry(0, BLOCK, CHUNK), GroupGeometry(1, BLOCK, CHUNK, look_back=63)]
    for polls in range(6):
        one, other = Ticket(2, polls), Ticket(1, polls)
        asked = iter([one, other])
        ticket = BoundaryTicket(lambda *_, a=asked: next(a), Store({}).each, groups, keys(2))
        assert ticket.wait(1.0) == 2


@pytest.mark.parametrize(
    ("group", "boundary", "needed", "kept"),
    [
        (GroupGeometry(0, 16, 64), 128, 0, 4),
        # vLLM's own example: a window of 4, 7 tokens computed, 4 of them out of sight.
        (GroupGeometry(0, 1, 7, look_back=3), 7, 4, 3),
        (GroupGeometry(0, 16, 64, look_back=15), 128, 113, 1),
        (GroupGeometry(0, 16, 64, look_back=16), 128, 112, 1),
        (GroupGeometry(0, 16, 64, look_back=17), 128, 111, 2),
        (GroupGeometry(0, 16, 64, look_back=1000), 128, 0, 4),
        (GroupGeometry(0, 4, 4, segment=8), 12, 8, 1),
        (GroupGeometry(0, 4, 4, segment=8), 8, 8, 1),
    ],
)
def test_what_a_group_needs(group, boundary, needed, kept):
    assert (group.needed_from(boundary), group.kept_blocks) == (needed, kept)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"block_tokens": 24}, "no multiple of the block's 24"),
        ({"block_tokens": 0}, "no multiple"),
        ({"look_back": 0}, "looks back over 0"),
        ({"segment": 96}, "attention chunks of 96"),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(ValueError, match=words):
        GroupGeometry(**{"index": 0, "block_tokens": 16, "chunk_size": 64} | sizes)


def test_a_listing_that_is_shorter_than_its_prefix():
    window = GroupGeometry(3, BLOCK, CHUNK, look_back=2 * CHUNK)
    assert last_boundary(3, [window], {3: [True, True, False]}) == 2
    assert last_boundary(0, [window], {3: []}) == 0
