"""LMCache's `GdsBackend` on host memory, asked over standard input.

Its device memory is a CPU buffer, its copies are the C library's; all else is LMCache's own. Runs
in a process of its own, since kvrail must never import LMCache.
"""

import asyncio
import ctypes
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.tensor_memory_allocator import TensorMemoryAllocator
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import gds_backend
from lmcache.v1.token_database import ChunkedTokenDatabase

BUFFER_MIB = 64
WAIT_SECONDS = 30.0


class HostBackend(gds_backend.GdsBackend):
    """The backend with a buffer of the host in place of the GPU's."""

    # LMCache sets it after its scan began, which may ask for it before.
    _use_noatime = True

    def initialize_allocator(self, config: Any, metadata: Any) -> Any:
        """LMCache's allocator over memory of the host."""
        buffer = torch.empty(config.gds_buffer_size << 20, dtype=torch.uint8)
        allocator = TensorMemoryAllocator(buffer, align_bytes=4096)
        allocator.base_pointer = buffer.data_ptr()  # type: ignore[attr-defined]
        return allocator


def _copy(target: Any, source: Any, count: Any, kind: Any) -> int:
    ctypes.memmove(target, source, count.value)
    return 0


gds_backend._load_gpu_memcpy = lambda: _copy


def _config(path: str, chunk_size: int = 256, algorithm: str = "builtin") -> Any:
    return LMCacheEngineConfig.from_defaults(
        chunk_size=chunk_size,
        gds_path=path,
        gds_buffer_size=BUFFER_MIB,
        use_gds=False,
        pre_caching_hash_algorithm=algorithm,
        extra_config={},
    )


@contextmanager
def _backend(path: str) -> Iterator[Any]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    backend = HostBackend(_config(path), None, loop, "cuda:0")
    backend._scan_metadata_future.result(timeout=WAIT_SECONDS)
    try:
        yield backend
    finally:
        backend.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _digest(memory: Any) -> list[Any]:
    content = memory.tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
    shape = list(memory.metadata.shape)
    digest = hashlib.sha256(content).hexdigest()
    return [digest, shape, str(memory.metadata.dtype), memory.metadata.fmt.value]


def read(path: str) -> dict[str, list[Any]]:
    """All that LMCache finds: by key, a digest of the bytes, shape, type, format."""
    found = {}
    with _backend(path) as backend:
        for key in list(backend.hot_cache):
            memory = backend.get_blocking(key)
            found[key.to_string()] = None if memory is None else _digest(memory)
            if memory is not None:
                memory.ref_count_down()
    return found


def contains(question: dict[str, Any]) -> list[bool]:
    """Which of some keys LMCache finds without its scan, as those that came later."""
    from lmcache.utils import parse_cache_key

    with _backend(question["path"]) as backend:
        backend.hot_cache.clear()
        return [backend.contains(parse_cache_key(key)) for key in question["keys"]]


def copy(paths: tuple[str, str]) -> int:
    """Has LMCache write all that it reads in one directory to another; how many files."""
    source, target = paths
    count = 0
    with _backend(source) as reader, _backend(target) as writer:
        for key in list(reader.hot_cache):
            memory = reader.get_blocking(key)
            # As it would be in memory of the writer.
            mine = writer.allocate(memory.metadata.shape, memory.metadata.dtype)
            mine.metadata.fmt = memory.metadata.fmt
            mine.tensor.copy_(memory.tensor)
            writer.submit_put_task(key, mine).result(timeout=WAIT_SECONDS)
            deadline = time.monotonic() + WAIT_SECONDS
            while writer.save_metadata_tasks and time.monotonic() < deadline:
                time.sleep(0.01)
            memory.ref_count_down()
            mine.ref_count_down()
            count += 1
    return count


def keys(prompt: dict[str, Any]) -> list[str]:
    """LMCache's keys of a prompt's chunks."""
    metadata = LMCacheMetadata(
        model_name=prompt["model"],
        world_size=prompt["world_size"],
        local_world_size=prompt["world_size"],
        worker_id=prompt["worker_id"],
        local_worker_id=prompt["worker_id"],
        kv_dtype=getattr(torch, prompt["dtype"]),
        kv_shape=(1, 2, prompt["chunk_size"], 1, 1),
        use_mla=prompt.get("use_mla", False),
    )
    config = _config("/none", prompt["chunk_size"], prompt["algorithm"])
    database = ChunkedTokenDatabase(config, metadata)
    return [
        key.to_string()
        for start, end, key in database.process_tokens(tokens=prompt["tokens"])
        if end - start == prompt["chunk_size"]
    ]


ANSWERS = {"read": read, "contains": contains, "copy": copy, "keys": keys}


def main() -> None:
    """Answers what is asked, each question with its argument."""
    # LMCache logs to standard output.
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([ANSWERS[name](argument) for name, argument in json.load(sys.stdin)], out)


if __name__ == "__main__":
    main()
