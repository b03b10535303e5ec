"""The checks: what a store writes and reads is compared with what PyTorch's indexing gives.

Everything is random: the stored blocks, which blocks they are, and what lies in the targets before
a load. Always the whole KV cache is compared, so that a byte written where none belongs is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kvrail import Config, KvCache, Namespace, Store
from kvrail.kv_cache import from_tensors

from cases import Case
from memory import Gpu, Memory, layer_views
from outcome import CheckError, OtherWayError, Outcome
from serving import Serving

LIMIT_SECONDS = 120.0
CHUNKS = 3
# Of one step, as a prefill of 10,000 tokens ends them.
STEP_CHUNKS = 40
# VRAM of slots before pinned memory (`PINNED_SLOTS_BYTES` of the library): with more, some wait.
PINNED_SLOTS_BYTES = 512 << 20
BUFFER_MIB = 64


@dataclass(frozen=True)
class Way:
    """One way from KV cache to files: its settings, and what shows that it is taken."""

    name: str
    settings: dict[str, object]
    route: str
    """What ``KvCache.routes`` says then."""


WAYS = (
    Way("posix", {"use_cufile": False}, "posix"),
    Way("staged", {"direct": False}, "slot"),
    Way("direct", {"direct": True}, "in_place"),
)
# Tried where cuFile has no direct path: no better than POSIX, but the same calls.
COMPATIBLE: dict[str, object] = {"cufile_compat_mode": True}


def run_checks(
    gpu: Gpu,
    directory: Path,
    some_cases: list[Case],
    seed: int,
    ways: tuple[Way, ...] = WAYS,
) -> Iterator[Outcome]:
    """Runs every check on every case and way, each in a directory of its own."""
    checks: tuple[tuple[str, Callable[[Bench], str]], ...] = (
        ("store and load", store_and_load),
        ("blocks used again", use_blocks_again),
        ("part of a chunk", load_part),
        ("damaged file", load_damaged),
        ("at work", serve),
    )
    number = 0
    for case in some_cases:
        for way in ways:
            if way.route == "in_place" and not case.is_block_outermost:
                continue
            for name, check in checks:
                number += 1
                folder = directory / f"check-{number}"
                title = f"{case.name}, {way.name}"
                start = time.monotonic()
                try:
                    outcome, detail = _run(check, lambda: Bench(gpu, case, way, folder, seed))  # noqa: B023
                except OtherWayError as error:
                    yield Outcome(title, "skipped", str(error), time.monotonic() - start)
                    break
                yield Outcome(f"{title}: {name}", outcome, detail, time.monotonic() - start)
            else:
                if not case.has_large_chunks:
                    continue
                number += 1
                folder, large = directory / f"check-{number}", case.with_large_chunks()
                start = time.monotonic()
                mib = BUFFER_MIB + 3 * STEP_CHUNKS * large.chunk_bytes // (2 << 20)
                outcome, detail = _run(
                    store_a_step,
                    lambda: Bench(gpu, large, way, folder, seed, mib),  # noqa: B023
                )
                seconds = time.monotonic() - start
                yield Outcome(f"{title}: {STEP_CHUNKS} chunks at once", outcome, detail, seconds)


def _run(check: Callable[[Bench], str], make: Callable[[], Bench]) -> tuple[str, str]:
    try:
        return "passed", check(make())
    except OtherWayError:
        raise
    except Exception as error:
        # Whatever it is, the other checks are still to come.
        return "failed", f"{type(error).__name__}: {error}"


class Bench:
    """A store with a KV cache on a GPU, chunks of random blocks, and what they should hold."""

    def __init__(
        self,
        gpu: Gpu,
        case: Case,
        way: Way,
        folder: Path,
        seed: int,
        buffer_mib: int = BUFFER_MIB,
    ) -> None:
        """Opens the store. Raises ``OtherWayError`` when it takes another way than `way`."""
        self.case, self.way, self.folder = case, way, folder
        self._buffer_mib = buffer_mib
        self.random = random.Random(f"{seed} {case.name}")
        self._generator = torch.Generator().manual_seed(self.random.randrange(1 << 60))
        self.namespace = Namespace("gpu/check", json.dumps({"case": case.name}))
        self.memory: Memory = gpu.memory(case)
        self.mode = ""
        try:
            self._open(gpu, way.settings)
        except OtherWayError:
            if way.route == "posix":
                raise
            self._open(gpu, {**way.settings, **COMPATIBLE})
            self.mode = " (cuFile in its compatible mode)"
        blocks = list(range(case.blocks))
        self.random.shuffle(blocks)
        step = case.blocks_per_chunk
        chunks = [blocks[start : start + step] for start in range(0, 2 * CHUNKS * step, step)]
        self.sources, self.targets = chunks[:CHUNKS], chunks[CHUNKS:]

    def noise(self) -> torch.Tensor:
        """Random bytes for a whole KV cache."""
        return self.noise_of(self.case.storage_bytes)

    def noise_of(self, count: int) -> torch.Tensor:
        """Random bytes."""
        return torch.randint(-128, 128, (count,), dtype=torch.int8, generator=self._generator)

    def key(self, index: int) -> bytes:
        """The key of a chunk."""
        return _key(index)

    def store_sources(self, use_again: bool = False) -> tuple[torch.Tensor, list[int]]:
        """Stores the chunks; returns what the KV cache held at that point of the stream, and which
        chunks were stored.

        Before the store, the stream has work and the write of the blocks still ahead. `use_again`
        overwrites all blocks on the stream as soon as the call is back; a store in place may give
        the chunk up then.
        """
        content = self.noise()
        self.memory.compute()
        self.memory.send(content)
        tickets = []
        for index, blocks in enumerate(self.sources):
            chunk = (_key(index), _parent(index), blocks)
            tickets.append(self.kv_cache.store([chunk], stream=self.memory.stream))
            if use_again:
                self.memory.overwrite(blocks)
            self.memory.compute()
        reports = [ticket.wait(LIMIT_SECONDS) for ticket in tickets]
        stored = [index for index, report in enumerate(reports) if report.stored == 1]
        may_drop = use_again and self.way.route == "in_place"
        if any(report.failed for report in reports) or (len(stored) < CHUNKS and not may_drop):
            raise CheckError(f"only chunks {stored} were stored: {self.notices()}")
        if not self.memory.computed_right():
            raise CheckError("work on the compute stream had a wrong result while stores ran")
        return content, stored

    def load(self, first_block: int = 0) -> Any:
        """Loads all chunks from `first_block` on into their targets; returns the report."""
        chunks = [
            (_key(index), _parent(index), first_block, blocks[first_block:])
            for index, blocks in enumerate(self.targets)
        ]
        ticket = self.kv_cache.load(chunks, stream=self.memory.stream)
        return ticket.wait(LIMIT_SECONDS)

    def expect(
        self, before: torch.Tensor, content: torch.Tensor, first_block: int, chunks: list[int]
    ) -> torch.Tensor:
        """The KV cache after a load of `chunks` of `content` into what was there `before`."""
        expected = before.clone()
        views = zip(layer_views(self.case, expected), layer_views(self.case, content), strict=True)
        for target, source in views:
            for chunk in chunks:
                target[self.targets[chunk][first_block:]] = source[
                    self.sources[chunk][first_block:]
                ]
        return expected

    def compare(self, expected: torch.Tensor, but_blocks: tuple[int, ...] = ()) -> None:
        """Compares the whole KV cache, except `but_blocks`; raises ``CheckError``."""
        found = self.memory.fetch()
        for block in but_blocks:
            for offset, count in self.case.spans(block):
                found[offset : offset + count] = expected[offset : offset + count]
        if torch.equal(found, expected):
            return
        wrong = (found != expected).nonzero()
        first = int(wrong[0])
        raise CheckError(
            f"{len(wrong)} bytes of {len(expected)} differ, the first at {first}: "
            f"{int(found[first])} instead of {int(expected[first])}"
        )

    def chunk_path(self, index: int) -> Path:
        """The file of a chunk."""
        name = _key(index).hex()
        folder = self.folder / self.namespace.directory_name / "g0r0" / name[:3]
        return folder / f"{name}.safetensors"

    def notices(self) -> str:
        """What the store has to say since the last call."""
        return "; ".join(message for _, message in self.store.take_notices())

    def close(self) -> None:
        """Ends the store, which must have gone its way all the time."""
        metrics = self.store.metrics()
        self.store.close(LIMIT_SECONDS)
        fallbacks = metrics.get("cufile_fallbacks", 0)
        if fallbacks:
            raise CheckError(f"cuFile failed on {fallbacks:.0f} chunks: {self.notices()}")

    def _open(self, gpu: Gpu, settings: dict[str, object]) -> None:
        known: dict[str, object] = {"gds_path": str(self.folder), "min_free": 0}
        known["cufile_buffer_size"] = self._buffer_mib
        config = Config.resolve(json.dumps({**known, **settings}), {}, None)
        self.store = Store(config, self.namespace, **gpu.store_options)
        kv_memory = from_tensors(self.memory.views, self.case.blocks)
        step = self.case.blocks_per_chunk
        self.kv_cache: KvCache = kv_memory.attach(self.store, blocks_per_chunk=step)
        if self.kv_cache.routes != [self.way.route]:
            mount, notices = self.store.describe()[0], self.notices()
            self.store.close(LIMIT_SECONDS)
            raise OtherWayError(f"engine {mount['engine']}: {mount['reason']}; {notices}")


def store_and_load(bench: Bench) -> str:
    """All chunks, into other blocks."""
    content, _ = bench.store_sources()
    before = bench.noise()
    bench.memory.send(before)
    report = bench.load()
    if report.loaded != CHUNKS:
        raise CheckError(f"{report.loaded} of {CHUNKS} chunks loaded: {report.errors}")
    bench.compare(bench.expect(before, content, 0, list(range(CHUNKS))))
    bench.close()
    return f"{CHUNKS} chunks of {bench.kv_cache.payload_bytes} bytes{bench.mode}"


def use_blocks_again(bench: Bench) -> str:
    """All blocks are overwritten on the stream as soon as each store call is back.

    What is stored then is what the blocks held before, or nothing: never something in between.
    """
    content, stored = bench.store_sources(use_again=True)
    before = bench.noise()
    bench.memory.send(before)
    report = bench.load()
    others = [chunk for chunk in range(CHUNKS) if chunk not in stored]
    if list(report.failed) != others:
        raise CheckError(f"stored {stored}, failed to load {report.failed}: {report.errors}")
    bench.compare(
        bench.expect(before, content, 0, stored),
        tuple(block for chunk in others for block in bench.targets[chunk]),
    )
    bench.close()
    return f"{len(stored)} of {CHUNKS} chunks stored, each as it was"


def load_part(bench: Bench) -> str:
    """The last blocks of each chunk; the targets of the others stay as they are."""
    content, _ = bench.store_sources()
    before = bench.noise()
    bench.memory.send(before)
    first_block = bench.random.randrange(1, bench.case.blocks_per_chunk)
    report = bench.load(first_block)
    if report.loaded != CHUNKS:
        raise CheckError(f"{report.loaded} of {CHUNKS} chunks loaded: {report.errors}")
    bench.compare(bench.expect(before, content, first_block, list(range(CHUNKS))))
    bench.close()
    return f"from block {first_block} on"


def load_damaged(bench: Bench) -> str:
    """A chunk whose file has one flipped bit is reported, and the others are loaded."""
    content, _ = bench.store_sources()
    damaged = bench.random.randrange(CHUNKS)
    path = bench.chunk_path(damaged)
    file = bytearray(path.read_bytes())
    # Behind the head, which has the first page.
    at = 4096 + bench.random.randrange(bench.kv_cache.payload_bytes)
    file[at] ^= 1 << bench.random.randrange(8)
    # To the disk: the store may read it behind the page cache's back.
    with path.open("r+b") as opened:
        opened.write(file)
        opened.flush()
        os.fsync(opened.fileno())
    before = bench.noise()
    bench.memory.send(before)
    report = bench.load()
    if (list(report.failed), report.loaded) != ([damaged], CHUNKS - 1):
        raise CheckError(
            f"chunk {damaged} is damaged at {at}: {report.loaded} loaded, failed {report.failed}"
        )
    others = [chunk for chunk in range(CHUNKS) if chunk != damaged]
    expected = bench.expect(before, content, 0, others)
    try:
        bench.compare(expected)
        state = "its blocks untouched"
    except CheckError:
        # Reported, so that its blocks count as nothing; all others must be right.
        bench.compare(expected, tuple(bench.targets[damaged]))
        state = "its blocks written to"
    bench.close()
    return f"byte {at}: reported, {state}"


def store_a_step(bench: Bench) -> str:
    """More chunks at once than VRAM slots on the way to pinned memory; none is dropped.

    All blocks are overwritten as soon as the call is back, but for a store in place, which then
    gives up.
    """
    case, memory = bench.case, bench.memory
    step = case.blocks_per_chunk
    parts = [list(range(start, start + step)) for start in range(0, case.blocks, step)]
    content = bench.noise()
    # Tens of milliseconds on a GPU, far more than the call takes: it must not catch up with it.
    for _ in range(4):
        memory.compute()
    memory.send(content)
    chunks = [(bench.key(index), None, parts[index % len(parts)]) for index in range(STEP_CHUNKS)]
    ticket = bench.kv_cache.store(chunks, stream=memory.stream)
    if bench.way.route != "in_place":
        memory.overwrite([block for part in parts for block in part])
    memory.compute()
    report = ticket.wait(LIMIT_SECONDS)
    waited = int(bench.store.metrics()["stores_waited_for_slot"])
    if report.stored != STEP_CHUNKS:
        raise CheckError(f"{report.stored} of {STEP_CHUNKS} chunks stored: {bench.notices()}")
    if not memory.computed_right():
        raise CheckError("work on the compute stream had a wrong result while stores ran")
    has_fewer_slots = STEP_CHUNKS * case.chunk_bytes > PINNED_SLOTS_BYTES
    if bench.way.route == "posix" and has_fewer_slots and waited == 0:
        raise CheckError("no store waited for a VRAM slot, though there were fewer than chunks")
    for first in range(0, STEP_CHUNKS, len(parts)):
        memory.send(bench.noise())
        loads = [
            (bench.key(first + at), None, 0, parts[(first + at) % len(parts)])
            for at in range(min(len(parts), STEP_CHUNKS - first))
        ]
        loaded = bench.kv_cache.load(loads, stream=memory.stream).wait(LIMIT_SECONDS)
        if loaded.loaded != len(loads):
            raise CheckError(f"{loaded.loaded} of {len(loads)} loaded: {loaded.errors}")
        bench.compare(content)
    bench.close()
    return f"{waited} waited for a VRAM slot of another{bench.mode}"


def serve(bench: Bench) -> str:
    """Blocks that forwards, stores and loads pass on to each other; in the end each is right."""
    served = Serving(bench).run()
    bench.close()
    return served


def _key(index: int) -> bytes:
    return hashlib.sha256(f"gpu-check {index}".encode()).digest()


def _parent(index: int) -> bytes | None:
    return _key(index - 1) if index else None
