"""The storage plugin of LMCache's in-process engine.

Objects lie in the pinned buffer of LMCache's `LocalCPUBackend`, which is registered once. Whole
chunks are stored; what is shorter (`save_unfull_chunk`) or one layer of a chunk (`use_layerwise`)
would be a kind of its own for each length, and is left to LMCache's other backends.
"""

from __future__ import annotations

import asyncio
import hashlib
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lmcache.logging import init_logger
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.platform import consume_fd
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from kvrail._core import ConfigError, KvrailError, SlabStore
from kvrail.lmcache.object_kind import ObjectKind
from kvrail.lmcache.settings import resolve

logger = init_logger(__name__)

POLL_MILLISECONDS = 500
"""How often the thread that ends stores looks whether there is something to log, or an end."""
PREFIX = "storage_plugin."


class KvrailStorage(StoragePluginInterface):
    """Stores the chunks of LMCache's engine as kvrail's chunk files; see ``docs/lmcache.md``."""

    def __init__(self, **given: Any) -> None:
        """Registers the buffer. ``extra_config`` has kvrail's keys as ``storage_plugin.NAME.KEY``.

        Raises ``ConfigError`` for a setting that cannot work, or host memory in several pieces.
        """
        super().__init__(**given)
        config = resolve(own_params(self.config.extra_config or {}, type(self).__name__))
        buffer = getattr(self.local_cpu_backend.memory_allocator, "buffer", None)
        align = getattr(self.local_cpu_backend.memory_allocator, "align_bytes", None)
        if buffer is None or align is None:
            raise ConfigError("`local_cpu_backend`: expected one buffer of host memory")
        size = buffer.numel() * buffer.element_size()
        self._store = SlabStore(config, buffer.data_ptr(), size, buffer, align=align)
        limit = config.as_dict()["extra_config.wait_limit_seconds"]["value"]
        self._wait_limit: float = limit
        # A load may wait for its turn for half as long again before the wait limit begins.
        self._load_limit: float = 3 * limit
        self._kinds: dict[ObjectKind, int] = {}
        self._puts: dict[int, tuple[list[CacheEngineKey], list[MemoryObj], Any]] = {}
        self._under_way: dict[CacheEngineKey, int] = {}
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._end_puts, name="kvrail-puts", daemon=True)
        self._thread.start()
        for warning in config.warnings:
            logger.warning("kvrail: %s", warning)

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """The number of leading keys that are there. Nothing is pinned: files are shared."""
        try:
            kind = self._kind()
            task = self._store.submit_lookup([self._name(kind, key) for key in keys])
            found = self._store.wait_for_lookup(task, self._wait_limit)
        except KvrailError as error:
            logger.warning("kvrail: lookup failed, taken as a miss: %s", error)
            return 0
        return found.index(False) if False in found else len(found)

    async def batched_async_contains(
        self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False
    ) -> int:
        return await asyncio.to_thread(self.batched_contains, keys, pin)

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        with self._lock:
            return key in self._under_way

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> list[Future[Any]] | None:
        """Stores whole chunks in the background; their memory is kept until that is done."""
        try:
            kind = self._kind()
        except KvrailError as error:
            logger.warning("kvrail: not stored: %s", error)
            return None
        size = self._object_kind().object_bytes
        whole = [
            (key, memory)
            for key, memory in zip(keys, objs, strict=True)
            if memory.get_size() == size and type(key) is CacheEngineKey
        ]
        if not whole:
            return None
        with self._lock:
            for key, memory in whole:
                memory.ref_count_up()
                self._under_way[key] = self._under_way.get(key, 0) + 1
            # Under the lock, so that the task is known here before it is seen to be done.
            task = self._store.submit_store(
                [(*self._name(kind, key), memory.data_ptr) for key, memory in whole]
            )
            kept = ([key for key, _ in whole], [memory for _, memory in whole])
            self._puts[task] = (*kept, on_complete_callback)
        return None

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """The chunks of `keys`, verified; None for each that is missing, damaged or late."""
        try:
            kind = self._kind()
        except KvrailError as error:
            logger.warning("kvrail: not loaded: %s", error)
            return [None] * len(keys)
        metadata = self.metadata
        form = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
        found: list[MemoryObj | None] = [
            self.local_cpu_backend.allocate(metadata.get_shapes(), metadata.get_dtypes(), form)
            if type(key) is CacheEngineKey
            else None
            for key in keys
        ]
        wanted = [(index, memory) for index, memory in enumerate(found) if memory is not None]
        objects = [(*self._name(kind, keys[index]), memory.data_ptr) for index, memory in wanted]
        try:
            task = self._store.submit_load(objects)
            loaded = self._store.wait_for_load(task, self._load_limit)
        except KvrailError as error:
            # The memory may still be written to, so it is not given back.
            logger.warning("kvrail: %d chunks of memory are lost: %s", len(wanted), error)
            return [None] * len(keys)
        for (index, memory), is_loaded in zip(wanted, loaded, strict=True):
            if not is_loaded:
                memory.ref_count_down()
                found[index] = None
        return found

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey], transfer_spec: Any = None
    ) -> list[MemoryObj]:
        """The chunks up to the first that is missing, as LMCache takes them for a prefix."""
        found = await asyncio.to_thread(self.batched_get_blocking, keys)
        end = found.index(None) if None in found else len(found)
        for memory in found[end:]:
            if memory is not None:
                memory.ref_count_down()
        return found[:end]

    def pin(self, key: CacheEngineKey) -> bool:
        """Whether the key is there; see `batched_contains`."""
        return self.contains(key)

    def unpin(self, key: CacheEngineKey) -> bool:
        return True

    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        try:
            return self._store.remove([self._name(self._kind(), key)], self._wait_limit)[0] > 0
        except KvrailError as error:
            logger.warning("kvrail: not removed: %s", error)
            return False

    def touch_cache(self) -> None:
        """Uses are noted as chunks are loaded."""

    def get_allocator_backend(self) -> Any:
        return self.local_cpu_backend

    def close(self) -> None:
        """Waits for the stores that have begun. The buffer may be freed after it."""
        if self._is_closed.is_set():
            return
        try:
            self._store.close(4 * self._wait_limit)
        except KvrailError as error:
            logger.warning("kvrail: %s", error)
        self._is_closed.set()
        self._thread.join(2 * POLL_MILLISECONDS / 1000)

    def _object_kind(self) -> ObjectKind:
        metadata = self.metadata
        return ObjectKind.of(metadata.model_name, metadata.get_shapes(), metadata.get_dtypes())

    def _kind(self) -> int:
        """The number of the kind of whole chunks. LMCache knows the groups after its start only."""
        kind = self._object_kind()
        with self._lock:
            if kind not in self._kinds:
                self._kinds[kind] = kind.register(self._store)
            return self._kinds[kind]

    def _name(self, kind: int, key: CacheEngineKey) -> tuple[int, int, int, bytes]:
        # All that tells keys apart: model, ranks, hash, type and tags.
        digest = hashlib.sha256(b"kvrail lmcache engine key" + key.to_string().encode())
        return (kind, 0, key.worker_id, digest.digest())

    def _end_puts(self) -> None:
        """Gives back what finished stores have kept, and tells LMCache of each key."""
        event = self._store.events[0]
        poller = select.poll()
        poller.register(event, select.POLLIN)
        while True:
            ending = self._is_closed.is_set()
            if poller.poll(0 if ending else POLL_MILLISECONDS):
                consume_fd(event)
            for task, endings in self._store.take_stores():
                with self._lock:
                    keys, objects, callback = self._puts.pop(task)
                    for key in keys:
                        self._under_way[key] -= 1
                        if not self._under_way[key]:
                            del self._under_way[key]
                for key, memory, put in zip(keys, objects, endings, strict=True):
                    memory.ref_count_down()
                    if callback is not None and put != "missed":
                        _call(callback, key)
            for level, message in self._store.take_notices():
                log = logger.warning if level == "warning" else logger.info
                log("kvrail: %s", message)
            if ending:
                return


def own_params(extra_config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """The keys of the one plugin in ``extra_config`` whose class is ``class_name``.

    Raises ``ConfigError`` unless there is exactly one: LMCache does not tell a plugin its name.
    """
    ending = ".class_name"
    names = [
        key.removeprefix(PREFIX).removesuffix(ending)
        for key, value in extra_config.items()
        if key.startswith(PREFIX) and key.endswith(ending) and value == class_name
    ]
    if len(names) != 1:
        raise ConfigError(f"`storage_plugin.*.class_name` = {class_name}: {len(names)}, expected 1")
    start = f"{PREFIX}{names[0]}."
    own = {key.removeprefix(start): v for key, v in extra_config.items() if key.startswith(start)}
    return {key: v for key, v in own.items() if key not in ("module_path", "class_name")}


def _call(callback: Callable[[CacheEngineKey], None], key: CacheEngineKey) -> None:
    try:
        callback(key)
    except Exception:
        logger.exception("kvrail: the callback for a stored chunk failed")
