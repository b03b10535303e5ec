"""An L1 slab out of LMCache's classes, and a stand-in for the controllers that drive an adapter."""

from __future__ import annotations

import select
from typing import Any

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.memory_allocators.tensor_memory_allocator import TensorMemoryAllocator
from lmcache.v1.platform import consume_fd

ALIGN = 4096
SHAPE = torch.Size([2, 4, 256, 128])
DTYPE = torch.bfloat16
MODEL = "org/tiny-model"
SECONDS = 30.0


def key(index: int, **fields: Any) -> ObjectKey:
    """The key of the object number `index`."""
    named: dict[str, Any] = {"model_name": MODEL, "kv_rank": ObjectKey.ComputeKVRank(1, 0, 1, 0)}
    return ObjectKey(chunk_hash=index.to_bytes(32, "big"), **(named | fields))


class L1:
    """A slab, and LMCache's own allocator on it."""

    def __init__(self, size: int) -> None:
        backing = torch.zeros(size + ALIGN, dtype=torch.uint8)
        offset = -backing.data_ptr() % ALIGN
        self.buffer = backing[offset : offset + size]
        self.allocator = TensorMemoryAllocator(self.buffer, align_bytes=ALIGN)
        self.description = L1MemoryDesc(self.buffer.data_ptr(), size, ALIGN)

    def allocate(self, shape: torch.Size = SHAPE, dtype: torch.dtype = DTYPE) -> Any:
        memory = self.allocator.allocate(shape, dtype)
        assert memory is not None
        return memory

    def random(self, seed: int, shape: torch.Size = SHAPE, dtype: torch.dtype = DTYPE) -> Any:
        """An object of random bytes."""
        memory = self.allocate(shape, dtype)
        view = self.bytes(memory)
        generator = torch.Generator().manual_seed(seed)
        view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator))
        return memory

    def bytes(self, memory: Any) -> torch.Tensor:
        """The bytes of an object, where they lie."""
        start = memory.data_ptr - self.buffer.data_ptr()
        return self.buffer[start : start + memory.get_size()]


class Driver:
    """Drives an adapter as the controllers do: submits, polls the event, takes the result."""

    def __init__(self, adapter: dict[str, Any], l1: L1) -> None:
        """`adapter` is a value of the server's `--l2-adapter`."""
        config = get_l2_adapter_config_class(adapter["type"]).from_dict(adapter)
        self.adapter = create_l2_adapter_from_registry(config, l1_memory_desc=l1.description)

    def store(self, keys: list[ObjectKey], objects: list[Any]) -> Any:
        task = self.adapter.submit_store_task(keys, objects)
        self._wait(self.adapter.get_store_event_fd())
        (done,) = self.adapter.pop_completed_store_tasks().items()
        assert done[0] == task
        return done[1]

    def lookup(self, keys: list[ObjectKey], layout: bool = True) -> list[bool]:
        layouts = {0: MemoryLayoutDesc([SHAPE], [DTYPE])} if layout else {}
        task = self.adapter.submit_lookup_and_lock_task(keys, layouts)
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        found = self.adapter.query_lookup_and_lock_result(task)
        assert self.adapter.query_lookup_and_lock_result(task) is None
        return bits(found, len(keys))

    def load(self, keys: list[ObjectKey], objects: list[Any]) -> list[bool]:
        task = self.adapter.submit_load_task(keys, objects)
        self._wait(self.adapter.get_load_event_fd())
        loaded = self.adapter.query_load_result(task)
        self.adapter.submit_unlock(keys)
        return bits(loaded, len(keys))

    def _wait(self, event: int) -> None:
        poller = select.poll()
        poller.register(event, select.POLLIN)
        assert poller.poll(SECONDS * 1000), "no event"
        consume_fd(event)


def bits(bitmap: Bitmap, count: int) -> list[bool]:
    return [bitmap.test(index) for index in range(count)]
