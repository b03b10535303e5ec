"""Numpy memory, stores on a directory and chunk keys for the tests of ``kvrail._core``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvrail._core import Config, KvCache, LoadReport, Namespace, Store, StoreReport

# Far above what any step takes, so that a hang fails and a slow machine does not.
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Geometry:
    """How the layers of a KV cache lie in memory; ``layer_bytes`` has a block's bytes per layer."""

    layer_bytes: tuple[int, ...] = (4096, 4096, 4096)
    block_count: int = 32
    blocks_per_chunk: int = 4
    # "layer": one span per layer, blocks inside. "block": one span per block, layers inside.
    outer: str = "layer"
    # Bytes between two blocks that belong to nobody and must never be written to.
    gap_bytes: int = 0
    # Whether each layer is an allocation of its own.
    separate: bool = False

    @property
    def block_bytes(self) -> int:
        return sum(self.layer_bytes)

    @property
    def payload_bytes(self) -> int:
        return self.block_bytes * self.blocks_per_chunk


class HostMemory:
    """KV cache memory of a geometry, filled with random bytes of a seed."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        self.geometry = geometry
        self.layers: list[tuple[int, int, int, int]] = []
        sizes: list[int] = []
        count, gap = geometry.block_count, geometry.gap_bytes
        if geometry.outer == "block":
            stride = geometry.block_bytes + gap
            offset = 0
            for size in geometry.layer_bytes:
                self.layers.append((0, offset, stride, size))
                offset += size
            sizes.append(stride * count)
        else:
            offset = 0
            for index, size in enumerate(geometry.layer_bytes):
                region = index if geometry.separate else 0
                self.layers.append((region, 0 if geometry.separate else offset, size + gap, size))
                offset += (size + gap) * count
                if geometry.separate:
                    sizes.append((size + gap) * count)
            if not geometry.separate:
                sizes.append(offset)
        random = np.random.default_rng(seed)
        self.arrays = [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]

    def spans(self) -> list[tuple[int, int]]:
        return [(array.ctypes.data, array.nbytes) for array in self.arrays]

    def block(self, block: int) -> bytes:
        """The bytes of one block over all layers, in payload order."""
        parts = []
        for region, offset, stride, size in self.layers:
            start = offset + block * stride
            parts.append(self.arrays[region][start : start + size].tobytes())
        return b"".join(parts)

    def blocks(self, blocks: Sequence[int]) -> bytes:
        return b"".join(self.block(block) for block in blocks)

    def untouched(self, before: Sequence[np.ndarray], written: Sequence[int]) -> bool:
        """Whether all bytes outside the blocks in ``written`` are as in ``before``."""
        for region, (array, old) in enumerate(zip(self.arrays, before, strict=True)):
            different = array != old
            for layer_region, offset, stride, size in self.layers:
                if layer_region == region:
                    for block in written:
                        start = offset + block * stride
                        different[start : start + size] = False
            if different.any():
                return False
        return True

    def copy(self) -> list[np.ndarray]:
        return [array.copy() for array in self.arrays]

    def attach(self, store: Store, *, group: int = 0, rank: int = 0) -> KvCache:
        return store.attach(
            self.layers,
            self.spans(),
            self.arrays,
            block_count=self.geometry.block_count,
            blocks_per_chunk=self.geometry.blocks_per_chunk,
            group=group,
            rank=rank,
        )


def key(index: int) -> bytes:
    """The key of test chunk ``index``."""
    return hashlib.sha256(f"chunk {index}".encode()).digest()


def parent(index: int) -> bytes | None:
    """The key of the chunk before ``index`` in the prompt."""
    return key(index - 1) if index else None


def namespace(model: str = "test/model", **identity: Any) -> Namespace:
    return Namespace(model, json.dumps(identity))


def config(path: Path | str, **settings: Any) -> Config:
    """A small configuration; a test machine with a full disk is no reason to drop stores."""
    known = {"gds_path": str(path), "cufile_buffer_size": 8, "min_free": 0, **settings}
    return Config.resolve(json.dumps(known), {}, None)


@contextmanager
def open_store(
    path: Path | str, *, model: str = "test/model", read_only: bool = False, **settings: Any
) -> Iterator[Store]:
    """A store on ``path`` that is closed at the end, also when a test fails."""
    store = Store(config(path, **settings), namespace(model), read_only=read_only)
    try:
        yield store
    finally:
        store.close(LIMIT_SECONDS)


def store_chunks(kv_cache: KvCache, chunks: Mapping[int, Sequence[int]]) -> StoreReport:
    """Stores chunk ``index`` from its blocks, for each of ``chunks``, and waits."""
    items = [(key(index), parent(index), list(blocks)) for index, blocks in chunks.items()]
    return kv_cache.store(items).wait(LIMIT_SECONDS)


def load_chunks(kv_cache: KvCache, chunks: Mapping[int, Sequence[int]]) -> LoadReport:
    """Loads chunk ``index`` into its blocks, for each of ``chunks``, and waits."""
    items = [(key(index), parent(index), 0, list(blocks)) for index, blocks in chunks.items()]
    return kv_cache.load(items).wait(LIMIT_SECONDS)


def lookup(
    store: Store, indices: Sequence[int], *, group: int = 0, ranks: Sequence[int] = (0,)
) -> int:
    ticket = store.lookup([key(index) for index in indices], group=group, ranks=ranks)
    return ticket.wait(LIMIT_SECONDS)


def chunk_path(
    path: Path, index: int, *, model: str = "test/model", group: int = 0, rank: int = 0
) -> Path:
    """Where the file of test chunk ``index`` lies."""
    name = key(index).hex()
    folder = path / namespace(model).directory_name / f"g{group}r{rank}" / name[:3]
    return folder / f"{name}.safetensors"
