"""Measures loads of files that are named by KV heads: at the same TP size, and across sizes.

The KV cache of llama-3.1-70b in vLLM's layout LBHNC, in this process. Chunks are stored by a rank
of two heads, once named by the rank and once by its heads, and by two ranks of one head each. They
are loaded in turn, from the disk into other, poisoned memory, and every byte is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from kvrail._core import Config, KvCache, Namespace, Store

from bare_reader import drop_from_page_cache
from engine_run import chunk_files, scratch_folder, spread

LAYERS, HEAD_SIZE, BLOCK_TOKENS, ELEMENT_BYTES = 80, 128, 16, 2
HEAD_BYTES = 2 * BLOCK_TOKENS * HEAD_SIZE * ELEMENT_BYTES
"""K and V of a head in a block of a layer: 8 KiB."""
BLOCKS_PER_CHUNK = 16
CHUNKS = 12
LIMIT_SECONDS = 120.0
Part = int | tuple[int, int, int]
SIDES: dict[str, tuple[str, tuple[int, int], Part]] = {
    # The store that is read, the heads that are loaded, and what they are named by.
    "same TP size, named by rank": ("rank", (0, 2), 0),
    "same TP size, named by heads": ("whole", (0, 2), (0, 0, 2)),
    "two heads from two files of one": ("halves", (0, 2), (0, 0, 2)),
    "one head from a file of two": ("whole", (0, 1), (0, 0, 1)),
}
FIRST = next(iter(SIDES))


class Memory:
    """The KV cache of a rank with some of the heads: `[layer, block, head, bytes]`."""

    def __init__(self, heads: int) -> None:
        shape = (LAYERS, CHUNKS * BLOCKS_PER_CHUNK, heads, HEAD_BYTES)
        self.array = np.empty(shape, dtype=np.uint8)

    def attach(self, store: Store, part: Part) -> KvCache:
        """Attaches it, as the part of a model that is named so."""
        layers, blocks, heads, _ = self.array.shape
        block_bytes = heads * HEAD_BYTES
        spans = [
            (0, layer * blocks * block_bytes, block_bytes, block_bytes) for layer in range(layers)
        ]
        return store.attach(
            spans,
            [(self.array.ctypes.data, self.array.nbytes)],
            self.array,
            block_count=blocks,
            blocks_per_chunk=BLOCKS_PER_CHUNK,
            rank=part,
        )


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """A store that is opened anew, so that it believes nothing."""
    settings = {"gds_path": str(folder), "cufile_buffer_size": 256, "min_free": 0}
    config = Config.resolve(json.dumps(settings), {}, None)
    store = Store(config, Namespace("bench/heads", "{}"))
    try:
        yield store
    finally:
        store.close(LIMIT_SECONDS)


def keys() -> list[bytes]:
    """The keys of all chunks."""
    return [hashlib.sha256(f"heads {index}".encode()).digest() for index in range(CHUNKS)]


def blocks_of(index: int) -> list[int]:
    """The blocks of a chunk."""
    return list(range(index * BLOCKS_PER_CHUNK, (index + 1) * BLOCKS_PER_CHUNK))


def fill(folder: Path, source: Memory, parts: dict[Part, tuple[int, int]]) -> None:
    """Stores all chunks, the heads of each part under its name."""
    for part, (begin, end) in parts.items():
        memory = Memory(end - begin)
        memory.array[:] = source.array[:, :, begin:end]
        with opened(folder) as store:
            chunks = [(key, None, blocks_of(index)) for index, key in enumerate(keys())]
            cache = memory.attach(store, part)
            for chunk in chunks:
                report = cache.store([chunk]).wait(LIMIT_SECONDS)
                if report.stored != 1:
                    raise RuntimeError(f"a chunk was not stored: {report}")


def load(folder: Path, source: Memory, heads: tuple[int, int], part: Part) -> tuple[float, float]:
    """Loads all chunks from the disk; the seconds, and the CPU seconds of this process."""
    begin, end = heads
    target = Memory(end - begin)
    target.array.fill(0x5A)
    drop_from_page_cache(chunk_files(folder))
    with opened(folder) as store:
        cache = target.attach(store, part)
        chunks = [(key, None, 0, blocks_of(index)) for index, key in enumerate(keys())]
        start, used = time.perf_counter(), time.process_time()
        report = cache.load(chunks).wait(LIMIT_SECONDS)
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    if report.failed or not np.array_equal(target.array, source.array[:, :, begin:end]):
        raise RuntimeError(f"{report.failed} failed, or other bytes were loaded: {report.errors}")
    return seconds, cpu


def main() -> int:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    source = Memory(2)
    source.array[:] = np.random.default_rng(1).integers(0, 256, source.array.shape, dtype=np.uint8)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with scratch_folder("heads-") as folder:
        fill(folder / "rank", source, {0: (0, 2)})
        fill(folder / "whole", source, {(0, 0, 2): (0, 2)})
        fill(folder / "halves", source, {(0, 0, 1): (0, 1), (0, 1, 2): (1, 2)})
        # The first round is not counted.
        for number in range(rounds + 1):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                store, heads, part = SIDES[side]
                found[side].append(load(folder / store, source, heads, part))
    print(f"{CHUNKS} chunks of {BLOCKS_PER_CHUNK} blocks, {rounds} rounds in turn, from the disk")
    print("| load | GB/s | against the first | CPU s/GB |")
    print("| --- | --- | --- | --- |")
    chunk_heads = LAYERS * CHUNKS * BLOCKS_PER_CHUNK * HEAD_BYTES / 1e9
    speeds = {}
    for side, (_, (begin, end), _) in SIDES.items():
        size = (end - begin) * chunk_heads
        speeds[side] = [size / seconds for seconds, _ in found[side][1:]]
        ratios = [ours / first for ours, first in zip(speeds[side], speeds[FIRST], strict=True)]
        cpu = statistics.median(used / size for _, used in found[side][1:])
        print(f"| {side} | {spread(speeds[side])} | {spread(ratios)} | {cpu:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
