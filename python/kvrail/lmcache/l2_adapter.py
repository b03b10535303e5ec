"""The L2 adapter of LMCache's multiprocess server.

LMCache's controllers hand over keys and addresses and go on; kvrail's threads move the bytes
between the L1 slab and verified files, and signal an event when a task is done. No Python runs in
between. LMCache's locks are answered with nothing: files are shared with other hosts, on which a
lock here would hold nobody, and what is evicted between lookup and load is a miss.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

from kvrail._core import ConfigError, KvrailError, SlabStore
from kvrail.lmcache.object_kind import ObjectKind, chunk_key
from kvrail.lmcache.settings import resolve

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = init_logger(__name__)

NOTICE_SECONDS = 1.0
"""How often it is looked whether there is something to log."""
STORES_MAX = 65_536
"""Stores that LMCache may leave untaken; as many as kvrail keeps the answers of."""


class KvrailL2Adapter(L2AdapterInterface):
    """Stores LMCache's objects as kvrail's chunk files; see ``docs/lmcache.md``."""

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None):
        """Registers the L1 slab. ``params`` has kvrail's keys; ``gds_path`` is the one needed.

        Raises ``ConfigError`` for a setting that cannot work, or an L1 that is no single piece of
        host memory.
        """
        # No capacity is declared: kvrail bounds its directory itself (`max_size`, `min_free`).
        super().__init__()
        config = resolve(params)
        if l1_memory_desc is None:
            raise ConfigError("`l1_memory_desc`: expected L1 to be one piece of host memory")
        self._store = SlabStore(
            config,
            l1_memory_desc.ptr,
            l1_memory_desc.size,
            l1_memory_desc,
            align=l1_memory_desc.align_bytes,
        )
        self._wait_limit = config.as_dict()["extra_config.wait_limit_seconds"]["value"]
        self._paths = config.gds_path
        self._kinds: dict[ObjectKind, int] = {}
        self._layouts: dict[tuple[str, int], int] = {}
        """The kind that a model's object group had last, for lookups that do not say."""
        self._submitted: dict[int, tuple[list[ObjectKey], list[int]]] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._notices_at = 0.0
        self._closed = False
        for warning in config.warnings:
            logger.warning("kvrail: %s", warning)
        logger.info(
            "kvrail: L1 of %d bytes is stored in %s", l1_memory_desc.size, ", ".join(self._paths)
        )

    def get_store_event_fd(self) -> int:
        return self._store.events[0]

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._store.events[1]

    def get_load_event_fd(self) -> int:
        return self._store.events[2]

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        with self._lock:
            # Under the lock, so that the task is known here before its end can be taken.
            task = self._store.submit_store(self._objects(keys, objects))
            self._submitted[task] = (keys, [memory.get_size() for memory in objects])
            while len(self._submitted) > STORES_MAX:
                del self._submitted[next(iter(self._submitted))]
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        results: dict[int, L2StoreResult] = {}
        stored: list[tuple[ObjectKey, int]] = []
        with self._lock:
            for task, endings in self._store.take_stores():
                keys, sizes = self._submitted.pop(task, ([], []))
                # Unequal lengths: of a store that was forgotten here.
                named = zip(keys, sizes, endings, strict=False)
                new = [(key, size) for key, size, ending in named if ending == "stored"]
                stored += new
                success = "missed" not in endings
                results[task] = L2StoreResult(success, sum(size for _, size in new))
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])
        self._log_notices()
        return results

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        names = []
        with self._lock:
            for key in keys:
                layout = group_layout_descs.get(key.object_group_id)
                if layout is not None:
                    kind = self._kind(key, layout.shapes, layout.dtypes)
                else:
                    kind = self._layouts.get((key.model_name, key.object_group_id), -1)
                names.append(self._name(kind, key))
            return self._store.submit_lookup(names)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        found = self._store.take_lookup(task_id)
        self._log_notices()
        return None if found is None else _bitmap(found)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing is locked; see the head of this file."""

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        with self._lock:
            return self._store.submit_load(self._objects(keys, objects))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        loaded = self._store.take_load(task_id)
        self._log_notices()
        return None if loaded is None else _bitmap(loaded)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Removes the files of ``keys``, and waits for that within the wait limit."""
        with self._lock:
            known = [
                (key, self._layouts.get((key.model_name, key.object_group_id), -1)) for key in keys
            ]
        names = [self._name(kind, key) for key, kind in known]
        try:
            removed = self._store.remove(names, self._wait_limit)
        except KvrailError as error:
            logger.warning("kvrail: %d objects may not be removed: %s", len(keys), error)
            return
        gone = [(key, size) for key, size in zip(keys, removed, strict=True) if size]
        if gone:
            self._notify_keys_deleted([key for key, _ in gone], [size for _, size in gone])

    def close(self) -> None:
        """Waits for the stores that have begun. L1 may be freed after it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            # A store and the load behind it may each take the wait limit, once more for its turn.
            self._store.close(4 * self._wait_limit)
        except KvrailError as error:
            logger.warning("kvrail: %s", error)
        self._log_notices(at_once=True)

    def report_status(self) -> dict[str, Any]:
        """Health, and the sums of kvrail's counters over all kinds of objects."""
        sums: dict[str, float] = {}
        for metrics in self._store.metrics().values():
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        return {
            "is_healthy": not self._closed,
            "type": type(self).__name__,
            "gds_path": self._paths,
            "metrics": sums,
        }

    def _objects(
        self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]
    ) -> list[tuple[int, int, int, bytes, int]]:
        """Each object as kvrail is told of it. Holds the lock."""
        named = []
        for key, memory in zip(keys, objects, strict=True):
            kind = self._kind(key, memory.get_shapes(), memory.get_dtypes(), memory.get_size())
            named.append((*self._name(kind, key), memory.data_ptr))
        return named

    def _name(self, kind: int, key: ObjectKey) -> tuple[int, int, int, bytes]:
        key_bytes = chunk_key(key.chunk_hash, key.cache_salt)
        # No kind has the number beyond all: what is not known is missed.
        number = kind if kind >= 0 else 2**32
        return (number, key.object_group_id, key.kv_rank, key_bytes)

    def _kind(self, key: ObjectKey, shapes: Any, dtypes: Any, size: int | None = None) -> int:
        """The number of an object's kind, -1 for none. Holds the lock."""
        kind = ObjectKind.of(key.model_name, shapes, dtypes)
        if size is not None and size != kind.object_bytes:
            # Shortened or packed by somebody in between: its length is not its layout's.
            self._warn_once(f"an object of {size} bytes has a layout of {kind.object_bytes}")
            return -1
        number = self._kinds.get(kind)
        if number is None:
            try:
                number = kind.register(self._store)
            except ConfigError as error:
                self._warn_once(str(error))
                number = -1
            else:
                self._kinds[kind] = number
        self._layouts[(key.model_name, key.object_group_id)] = number
        return number

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < 100:
            self._warned.add(message)
            logger.warning("kvrail: not stored or loaded: %s", message)

    def _log_notices(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now < self._notices_at:
            return
        self._notices_at = now + NOTICE_SECONDS
        for level, message in self._store.take_notices():
            log = logger.warning if level == "warning" else logger.info
            log("kvrail: %s", message)


def _bitmap(bits: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for index, bit in enumerate(bits):
        if bit:
            bitmap.set(index)
    return bitmap
