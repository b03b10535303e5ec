"""A serving engine at work: forwards, stores and loads under way at the same time.

As ``crates/kvrail/tests/gpu_cufile/serving.rs``, which runs it on the mock by all ways to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from outcome import CheckError

if TYPE_CHECKING:
    from checks import Bench

# What the engine does at least, and how many chunks must have been stored, and loaded, by then.
ROUNDS = 100
MOVED = 5
ROUNDS_MAX = 100 * ROUNDS
LIMIT_SECONDS = 120.0
# How many of the stores keep their blocks until they end, as those of requests that go on.
KEPT = 0.7


@dataclass(frozen=True)
class Stored:
    """A chunk, and what must come back of it."""

    name: int
    content: list[torch.Tensor]
    may_be_bad: bool
    """Its blocks may have been others while cuFile read them in place, and have had the same bytes
    again before they were looked at: then its checksums tell, and it is a miss."""


class Serving:
    """What the engine knows: the KV cache once the stream has done all that it was given."""

    def __init__(self, bench: Bench) -> None:
        """Fills the KV cache."""
        self._bench = bench
        self._random = bench.random
        self._memory = bench.memory
        self._held = bench.noise()
        self._memory.send(self._held)
        self._stores: list[tuple[Any, Stored, list[int]]] = []
        self._stored: list[Stored] = []
        self._loads: list[tuple[Any, list[int], bool]] = []
        self._names = 0
        self._loaded = 0
        self._missed = 0

    def run(self) -> str:
        """Works. Raises ``CheckError``."""
        acts = [self._forward] * 3 + [self._store] * 2
        acts += [self._load, self._end_store, self._end_load]
        for number in range(ROUNDS_MAX):
            if number >= ROUNDS and min(len(self._stored), self._loaded) >= MOVED:
                break
            self._random.choice(acts)()
        while self._stores or self._loads:
            self._end_store()
            self._end_load()
        if min(len(self._stored), self._loaded) < MOVED:
            raise CheckError(f"{len(self._stored)} chunks stored, {self._loaded} loaded")
        self._bench.compare(self._held)
        missed = f", {self._missed} found bad" if self._missed else ""
        return f"{len(self._stored)} chunks stored, {self._loaded} loaded{missed}"

    def _free_blocks(self) -> list[int]:
        """Blocks for a chunk that no load has, and no store for whose end the engine waits."""
        busy = {block for _, _, kept in self._stores for block in kept}
        busy |= {block for _, blocks, _ in self._loads for block in blocks}
        free = [block for block in range(self._bench.case.blocks) if block not in busy]
        count = self._bench.case.blocks_per_chunk
        return self._random.sample(free, count) if len(free) >= count else []

    def _content(self, block: int) -> torch.Tensor:
        spans = self._bench.case.spans(block)
        return torch.cat([self._held[start : start + count] for start, count in spans])

    def _hold(self, block: int, content: torch.Tensor) -> None:
        start = 0
        for offset, count in self._bench.case.spans(block):
            self._held[offset : offset + count] = content[start : start + count]
            start += count

    def _forward(self) -> None:
        for block in self._free_blocks():
            self._write(block)

    def _write(self, block: int) -> None:
        content = self._bench.noise_of(len(self._content(block)))
        self._memory.put(block, content)
        self._hold(block, content)

    def _store(self) -> None:
        blocks = self._free_blocks()
        if not blocks:
            return
        self._names += 1
        keeps = self._random.random() < KEPT
        stored = Stored(
            self._names,
            [self._content(block) for block in blocks],
            self._bench.way.route == "in_place" and not keeps,
        )
        chunk = (self._bench.key(self._names), None, blocks)
        ticket = self._bench.kv_cache.store([chunk], stream=self._memory.stream)
        # The blocks of others are written to while they are stored.
        self._stores.append((ticket, stored, blocks if keeps else []))

    def _load(self) -> None:
        blocks = self._free_blocks()
        if not blocks or not self._stored:
            return
        stored = self._random.choice(self._stored)
        for block, content in zip(blocks, stored.content, strict=True):
            self._hold(block, content)
        chunk = (self._bench.key(stored.name), None, 0, blocks)
        ticket = self._bench.kv_cache.load([chunk], stream=self._memory.stream)
        self._loads.append((ticket, blocks, stored.may_be_bad))

    def _end_store(self) -> None:
        if not self._stores:
            return
        ticket, stored, _ = self._stores.pop(0)
        report = ticket.wait(LIMIT_SECONDS)
        if report.stored == 1:
            self._stored.append(stored)
        elif report.failed:
            raise CheckError(f"chunk {stored.name} was not stored: {self._bench.notices()}")

    def _end_load(self) -> None:
        if not self._loads:
            return
        ticket, blocks, may_be_bad = self._loads.pop(0)
        report = ticket.wait(LIMIT_SECONDS)
        if report.loaded == 1:
            self._loaded += 1
            return
        if not may_be_bad:
            raise CheckError(f"a chunk that was stored is a miss: {report.errors}")
        self._missed += 1
        # What they hold is nothing; the engine computes it.
        for block in blocks:
            self._write(block)
