"""A chunk file is a safetensors file that the public package reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from store_harness import (
    Geometry,
    HostMemory,
    chunk_path,
    key,
    namespace,
    open_store,
    store_chunks,
)


@pytest.mark.parametrize(
    ("geometry", "shape"),
    [
        (Geometry(), (4, 3, 4096)),
        (Geometry(layer_bytes=(1000, 1000)), (4, 2, 1000)),
        (Geometry(layer_bytes=(4096, 512)), (4, 1, 4608)),
    ],
    ids=["whole pages", "padding", "layers of different sizes"],
)
def test_the_public_package_reads_a_chunk(
    tmp_path: Path, geometry: Geometry, shape: tuple[int, ...]
) -> None:
    memory = HostMemory(geometry, seed=1)
    blocks = [5, 0, 17, 31]
    with open_store(tmp_path, chunk_size=64) as store:
        kv_cache = memory.attach(store)
        store_chunks(kv_cache, {1: blocks})
        file_bytes = kv_cache.chunk_file_bytes
    path = chunk_path(tmp_path, 1)
    assert path.stat().st_size == file_bytes
    assert path.read_bytes()[:8] == (4088).to_bytes(8, "little")

    tensors = load_file(path)
    pages = -(-geometry.payload_bytes // 4096)
    pad = pages * 4096 - geometry.payload_bytes
    assert set(tensors) == {"kvcache", "page_xxh3"} | ({"pad"} if pad else set())
    assert tensors["kvcache"].dtype == np.uint8
    assert tensors["kvcache"].shape == shape
    assert tensors["kvcache"].tobytes() == memory.blocks(blocks)
    if pad:
        assert tensors["pad"].tobytes() == bytes(pad)
    table = tensors["page_xxh3"]
    assert table.dtype == np.uint64
    assert table.size % 512 == 0
    assert not table[pages:].any()
    assert len(set(table[:pages].tolist())) == pages

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    root = metadata.pop("root_xxh3")
    assert len(root) == 16 and int(root, 16) > 0
    assert metadata == {
        "format": "kvrail",
        "version": "1",
        "namespace": namespace().id,
        "group": "0",
        "rank": "0",
        "tokens": "64",
        "chunk_key": key(1).hex(),
        "parent": key(0).hex(),
    }


def test_pages_with_equal_bytes_have_equal_checksums_and_no_others(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    first, second = (memory.layers[0][1] + block * memory.layers[0][2] for block in (0, 1))
    array = memory.arrays[0]
    array[second : second + 4096] = array[first : first + 4096]
    with open_store(tmp_path) as store:
        store_chunks(memory.attach(store), {0: range(4)})
    table = load_file(chunk_path(tmp_path, 0))["page_xxh3"][:12]
    # Block b's layer l is page 3 * b + l.
    assert table[0] == table[3]
    assert len(set(table.tolist())) == 11


def test_files_are_the_owners_alone_and_nothing_is_left_over(tmp_path: Path) -> None:
    path = tmp_path / "made" / "by" / "the store"
    with open_store(path) as store:
        store_chunks(HostMemory(Geometry(), seed=1).attach(store), {0: range(4), 1: range(4, 8)})
    directory = path / namespace().directory_name
    assert path.stat().st_mode & 0o777 == 0o700
    assert directory.stat().st_mode & 0o777 == 0o700
    assert chunk_path(path, 0).stat().st_mode & 0o077 == 0
    state = path / ".kvrail"
    assert state.stat().st_mode & 0o777 == 0o700
    everything = [file for file in path.rglob("*") if file.is_file()]
    assert all(file.stat().st_mode & 0o077 == 0 for file in everything)
    files = sorted(file for file in everything if state not in file.parents)
    expected = [directory / "manifest.json", chunk_path(path, 0), chunk_path(path, 1)]
    assert files == sorted(expected)
