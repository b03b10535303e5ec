"""Registration of KV cache memory: strided views in, arguments of ``Store.attach`` out.

A view is one layer of the KV cache: its first axis counts blocks, the rest is what one block holds.
Blocks are moved whole, as opaque bytes, so a block must be one contiguous span; how heads, tokens
and K and V are ordered inside it does not matter. Neither torch nor numpy is imported here: what a
view must offer is read from the object itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrail._core import KvCache, Store


class UnsupportedMemoryError(ValueError):
    """The memory of a view cannot be moved by this version; the message says which and why."""


@dataclass(frozen=True)
class LayerSpan:
    """Where one layer's blocks lie; all numbers are bytes, ``region`` indexes the regions."""

    region: int
    offset: int
    block_stride: int
    block_bytes: int


@dataclass(frozen=True)
class KvMemory:
    """The KV cache of one group on one rank, ready to be attached to a store.

    ``regions`` holds (address, bytes) of each allocation once, all on ``device`` (``cpu`` or
    ``cuda:<ordinal>``). ``owner`` keeps the memory alive for as long as the store may touch it.
    """

    layers: tuple[LayerSpan, ...]
    regions: tuple[tuple[int, int], ...]
    owner: object
    block_count: int
    device: str = "cpu"
    names: tuple[str, ...] = ()
    """The layers' names, for messages and identities."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(layer.block_bytes for layer in self.layers)

    def attach(
        self,
        store: Store,
        *,
        blocks_per_chunk: int,
        group: int = 0,
        rank: int | tuple[int, int, int] = 0,
        order: Any = None,
    ) -> KvCache:
        """Attaches this memory to `store`; `order` is that of ``Store.attach``.

        ``rank`` names its files: a rank, or a pipeline stage with a range of KV heads, the first
        and the one behind the last, for blocks that have heads outermost inside each layer.

        Raises ``KvrailError`` when a layer lies outside its region or the staging memory is too
        small.
        """
        return store.attach(
            [
                (layer.region, layer.offset, layer.block_stride, layer.block_bytes)
                for layer in self.layers
            ],
            list(self.regions),
            self.owner,
            block_count=self.block_count,
            blocks_per_chunk=blocks_per_chunk,
            group=group,
            rank=rank,
            device=self.device,
            order=order,
        )


@dataclass(frozen=True)
class _View:
    """One layer in plain numbers: strides are in bytes, the region is the whole allocation."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    region_address: int
    region_bytes: int


def from_tensors(
    tensors: Sequence[Any], block_count: int, names: Sequence[str] | None = None
) -> KvMemory:
    """Describes torch tensors on the CPU or on one CUDA GPU, one per layer, in payload order.

    The first axis of a tensor has ``block_count`` entries, or a multiple of it when the attention
    backend splits each block into equal kernel blocks. Raises ``UnsupportedMemoryError`` for memory
    of another or of several devices, and for blocks that are not one contiguous span.
    """
    views = []
    devices = sorted({_device_name(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise UnsupportedMemoryError(f"KV cache on several devices: {', '.join(devices)}")
    for index, tensor in enumerate(tensors):
        name = names[index] if names is not None else f"layer {index}"
        item_bytes = tensor.element_size()
        storage = tensor.untyped_storage()
        views.append(
            _View(
                name=name,
                address=tensor.data_ptr(),
                shape=tuple(tensor.shape),
                strides=tuple(stride * item_bytes for stride in tensor.stride()),
                item_bytes=item_bytes,
                region_address=storage.data_ptr(),
                region_bytes=storage.nbytes(),
            )
        )
    device = devices[0] if devices else "cpu"
    return _describe(views, block_count, owner=list(tensors), device=device)


def from_arrays(
    arrays: Sequence[Any], block_count: int, names: Sequence[str] | None = None
) -> KvMemory:
    """Describes writable numpy arrays, one per layer; otherwise as ``from_tensors``."""
    views = []
    for index, array in enumerate(arrays):
        name = names[index] if names is not None else f"layer {index}"
        if not array.flags.writeable:
            raise UnsupportedMemoryError(f"{name}: the array is read-only")
        root = array
        while isinstance(root.base, type(array)):
            root = root.base
        views.append(
            _View(
                name=name,
                address=array.__array_interface__["data"][0],
                shape=tuple(array.shape),
                strides=tuple(array.strides),
                item_bytes=array.itemsize,
                region_address=root.__array_interface__["data"][0],
                region_bytes=_extent(root),
            )
        )
    return _describe(views, block_count, owner=list(arrays))


def _device_name(device: Any) -> str:
    """The device of a tensor as ``Store.attach`` takes it; ``cuda`` alone is the current GPU."""
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda" and device.index is not None:
        return f"cuda:{device.index}"
    raise UnsupportedMemoryError(
        f"KV cache on {device}: this version moves memory of the host and of CUDA GPUs only"
    )


def _extent(array: Any) -> int:
    """Bytes from the first to the last item of an array whose strides are not negative."""
    if any(stride < 0 for stride in array.strides):
        raise UnsupportedMemoryError("an array with a negative stride cannot be registered")
    if array.size == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return int(last + array.itemsize)


def _describe(
    views: Sequence[_View], block_count: int, owner: object, device: str = "cpu"
) -> KvMemory:
    if not views:
        raise UnsupportedMemoryError("no layers were given")
    region_of_address: dict[int, int] = {}
    regions: list[tuple[int, int]] = []
    layers = []
    for view in views:
        region = region_of_address.get(view.region_address)
        if region is None:
            region = len(regions)
            region_of_address[view.region_address] = region
            regions.append((view.region_address, view.region_bytes))
        elif regions[region][1] < view.region_bytes:
            regions[region] = (view.region_address, view.region_bytes)
        block_stride, block_bytes = _block_geometry(view, block_count)
        layers.append(
            LayerSpan(region, view.address - view.region_address, block_stride, block_bytes)
        )
    names = tuple(view.name for view in views)
    return KvMemory(tuple(layers), tuple(regions), owner, block_count, device, names)


def _block_geometry(view: _View, block_count: int) -> tuple[int, int]:
    """Stride and size in bytes of one block; kernel blocks of one block count as one."""
    if not view.shape or block_count <= 0 or view.shape[0] == 0 or view.shape[0] % block_count:
        raise UnsupportedMemoryError(
            f"{view.name}: the first axis of shape {view.shape} is no multiple of "
            f"{block_count} blocks"
        )
    kernel_blocks = view.shape[0] // block_count
    axes = [
        (size, stride)
        for size, stride in zip(view.shape[1:], view.strides[1:], strict=True)
        if size > 1
    ]
    if kernel_blocks > 1:
        axes.append((kernel_blocks, view.strides[0]))
    expected = view.item_bytes
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if stride != expected:
            raise UnsupportedMemoryError(
                f"{view.name}: a block is not one contiguous span "
                f"(shape {view.shape}, strides {view.strides} in bytes)"
            )
        expected *= size
    block_stride = view.strides[0] * kernel_blocks
    if block_count > 1 and block_stride < expected:
        raise UnsupportedMemoryError(
            f"{view.name}: blocks of {expected} bytes overlap at a stride of {block_stride} bytes"
        )
    return block_stride, expected
