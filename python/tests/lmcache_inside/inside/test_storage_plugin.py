"""The storage plugin, made by LMCache's own launcher beside its own `LocalCPUBackend`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import storage_plugin_launcher
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

MODEL = "org/tiny-model"
SECONDS = 20.0


def key(index: int, **fields: Any) -> CacheEngineKey:
    named: dict[str, Any] = {"model_name": MODEL, "world_size": 1, "worker_id": 0}
    return CacheEngineKey(chunk_hash=index, dtype=torch.bfloat16, **(named | fields))


class Engine:
    """The parts of LMCache's engine around a plugin."""

    def __init__(self, folder: Path, **params: Any) -> None:
        own = {f"storage_plugin.kv.{name}": value for name, value in params.items()}
        config = LMCacheEngineConfig.from_defaults(
            max_local_cpu_size=0.1,
            storage_plugins=["kv"],
            extra_config={
                "storage_plugin.kv.module_path": "kvrail.lmcache",
                "storage_plugin.kv.class_name": "KvrailStorage",
                "storage_plugin.kv.gds_path": str(folder),
                **own,
            },
        )
        metadata = LMCacheMetadata(
            model_name=MODEL,
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(4, 2, 256, 2, 64),
        )
        self.metadata = metadata
        self.memory = LocalCPUBackend(config, metadata)
        backends: dict[str, Any] = {}
        storage_plugin_launcher(config, metadata, None, self.memory, "cpu", backends)
        self.plugin = backends.get("kv")

    def random(self, seed: int, tokens: int = 256) -> Any:
        shapes, dtypes = self.metadata.get_shapes(tokens), self.metadata.get_dtypes()
        memory = self.memory.allocate(shapes, dtypes, MemoryFormat.KV_2LTD)
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(memory.tensor.shape, generator=generator)
        memory.tensor.copy_(values)
        return memory

    def put(self, keys: list[CacheEngineKey], objects: list[Any]) -> list[CacheEngineKey]:
        """Stores, waits for the end, and returns the keys of which LMCache was told."""
        told: list[CacheEngineKey] = []
        self.plugin.batched_submit_put_task(keys, objects, on_complete_callback=told.append)
        deadline = time.monotonic() + SECONDS
        while any(self.plugin.exists_in_put_tasks(key) for key in keys):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return told


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    made = []

    def make(**params: Any) -> Engine:
        made.append(Engine(tmp_path / "kv", **params))
        return made[-1]

    yield make
    for engine in made:
        if engine.plugin is not None:
            engine.plugin.close()


def test_chunks_come_back_after_a_restart(engines: Callable[..., Engine]) -> None:
    first = engines()
    keys = [key(index) for index in range(4)]
    objects = [first.random(index) for index in range(4)]
    assert sorted(told.chunk_hash for told in first.put(keys, objects)) == [0, 1, 2, 3]
    assert all(memory.get_ref_count() == 1 for memory in objects)
    first.plugin.close()

    second = engines()
    assert second.plugin.batched_contains([*keys, key(9)]) == 4
    assert second.plugin.contains(keys[0]) and not second.plugin.contains(key(9))
    found = second.plugin.batched_get_blocking([*keys, key(9)])
    assert found[4] is None
    for memory, original in zip(found[:4], objects, strict=True):
        assert torch.equal(memory.tensor, original.tensor)
    prefix = asyncio.run(second.plugin.batched_get_non_blocking("id", [keys[0], key(9), keys[1]]))
    assert len(prefix) == 1 and torch.equal(prefix[0].tensor, objects[0].tensor)
    assert asyncio.run(second.plugin.batched_async_contains("id", keys)) == 4


def test_a_damaged_file_is_a_miss_and_its_memory_is_given_back(
    engines: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = engines()
    engine.put([key(1)], [engine.random(1)])
    (path,) = (tmp_path / "kv").glob("*/g0r0/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    free = engine.memory.memory_allocator.pin_allocator.address_manager.get_free_size()
    assert engine.plugin.get_blocking(key(1)) is None
    assert engine.memory.memory_allocator.pin_allocator.address_manager.get_free_size() == free
    assert list((tmp_path / "kv").glob("*/quarantine/*.safetensors"))
    assert not engine.plugin.contains(key(1))


def test_ranks_and_tags_are_apart_and_shorter_chunks_are_left_out(
    engines: Callable[..., Engine],
) -> None:
    engine = engines()
    engine.put([key(1)], [engine.random(1)])
    assert not engine.plugin.contains(key(1, worker_id=1, world_size=2))
    assert not engine.plugin.contains(key(1, request_configs={"lmcache.tag.user": "anna"}))
    short = engine.random(2, tokens=100)
    assert engine.put([key(2)], [short]) == []
    assert short.get_ref_count() == 1 and not engine.plugin.contains(key(2))


def test_removed_chunks_are_gone(engines: Callable[..., Engine]) -> None:
    engine = engines()
    engine.put([key(1)], [engine.random(1)])
    assert engine.plugin.remove(key(1)) and not engine.plugin.remove(key(1))
    assert not engine.plugin.contains(key(1))


def test_a_wrong_setting_leaves_lmcache_without_the_plugin(engines: Callable[..., Engine]) -> None:
    """LMCache logs what a constructor raises, and goes on."""
    assert engines(no_such_key=1).plugin is None
