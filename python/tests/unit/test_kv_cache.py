"""Registration of KV cache memory: every view names exactly the bytes of its blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kvrail.kv_cache import KvMemory, UnsupportedMemoryError, from_arrays, from_tensors

torch = pytest.importorskip("torch")

BLOCKS, HEADS, TOKENS, CONTENT = 6, 2, 4, 8


def check_bytes(memory: KvMemory, layer: int, backing: np.ndarray, view: np.ndarray) -> None:
    """Each block's span holds the bytes of that block of the view, and no others."""
    span = memory.layers[layer]
    for block in range(memory.block_count):
        start = span.offset + block * span.block_stride
        found = np.sort(backing.view(np.uint8).ravel()[start : start + span.block_bytes])
        expected = np.sort(np.ascontiguousarray(view[block]).view(np.uint8).ravel())
        assert np.array_equal(found, expected)


def layered(order: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Three layers in one allocation, as views [B, H, N, C] over the physical `order`."""
    sizes = {"L": 3, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}
    count = int(np.prod(list(sizes.values())))
    backing = np.arange(count, dtype=np.int32).reshape([sizes[axis] for axis in order])
    views = backing.transpose([order.index(axis) for axis in "LBHNC"])
    return backing, [views[layer] for layer in range(3)]


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_arrays(order):
    backing, views = layered(order)
    memory = from_arrays(views, BLOCKS)
    assert len(memory.regions) == 1
    assert memory.regions[0][1] == backing.nbytes
    assert memory.block_bytes == 3 * HEADS * TOKENS * CONTENT * 4
    for layer, view in enumerate(views):
        check_bytes(memory, layer, backing, view)


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_tensors(order):
    backing, views = layered(order)
    whole = torch.from_numpy(backing)
    tensors = [
        torch.as_strided(
            whole,
            view.shape,
            [stride // view.itemsize for stride in view.strides],
            (view.ctypes.data - backing.ctypes.data) // view.itemsize,
        )
        for view in views
    ]
    memory = from_tensors(tensors, BLOCKS)
    assert memory.layers == from_arrays(views, BLOCKS).layers
    assert memory.regions == ((backing.ctypes.data, backing.nbytes),)


def test_kernel_blocks_count_as_one_block():
    backing = np.arange(BLOCKS * 4 * 32, dtype=np.int16)
    view = backing.reshape(BLOCKS * 4, 1, 4, 8)
    memory = from_arrays([view], BLOCKS)
    assert memory.layers[0].block_bytes == memory.layers[0].block_stride == 4 * 32 * 2
    check_bytes(memory, 0, backing, view.reshape(BLOCKS, 4, 4, 8))


def test_padding_between_blocks_is_not_moved():
    backing = np.arange(BLOCKS * 100, dtype=np.uint8).reshape(BLOCKS, 100)
    view = backing[:, :96]
    memory = from_arrays([view], BLOCKS)
    assert (memory.layers[0].block_stride, memory.layers[0].block_bytes) == (100, 96)
    check_bytes(memory, 0, backing, view)


def test_separate_allocations_are_separate_regions():
    arrays = [np.zeros((BLOCKS, 16), dtype=np.float32) for _ in range(2)]
    memory = from_arrays(arrays, BLOCKS)
    assert [layer.region for layer in memory.layers] == [0, 1]
    assert memory.regions == tuple((array.ctypes.data, array.nbytes) for array in arrays)
    assert memory.owner == arrays


def head_outside(backing: np.ndarray) -> np.ndarray:
    return backing.reshape(HEADS, BLOCKS, TOKENS * CONTENT).transpose(1, 0, 2)


def overlapping(backing: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(backing, (BLOCKS, 8), (4, 4), writeable=True)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (head_outside, "not one contiguous span"),
        (overlapping, "overlap"),
        (lambda backing: backing.reshape(BLOCKS, -1)[:-1], "no multiple"),
        (lambda backing: backing.reshape(BLOCKS, -1)[:, ::2], "not one contiguous span"),
    ],
)
def test_memory_that_cannot_be_moved(view, message):
    backing = np.zeros(BLOCKS * HEADS * TOKENS * CONTENT, dtype=np.int32)
    with pytest.raises(UnsupportedMemoryError, match=message):
        from_arrays([view(backing)], BLOCKS)


def test_a_read_only_array_is_refused():
    array = np.zeros((BLOCKS, 4))
    array.flags.writeable = False
    with pytest.raises(UnsupportedMemoryError, match="read-only"):
        from_arrays([array], BLOCKS)


def test_memory_of_an_unknown_device_is_refused():
    tensor = torch.empty((BLOCKS, 4), device="meta")
    with pytest.raises(
        UnsupportedMemoryError, match=r"KV cache on meta: .* host and of CUDA GPUs only"
    ):
        from_tensors([tensor], BLOCKS)


def test_no_layers():
    with pytest.raises(UnsupportedMemoryError, match="no layers"):
        from_arrays([], BLOCKS)
