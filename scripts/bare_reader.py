"""The least that loading files into memory can take: bare reads by threads, and plain copies."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096


class BareReader:
    """Reads files of one size with as many threads, each into a buffer of its own."""

    def __init__(self, files: Sequence[Path], threads: int) -> None:
        self._files = list(files)
        self._threads = threads
        sizes = {file.stat().st_size for file in files}
        if len(sizes) != 1:
            raise ValueError(f"files of {len(sizes)} sizes, expected one")
        self.file_bytes = sizes.pop()
        self.bytes = self.file_bytes * len(self._files)
        # Memory that is used for the first time costs page faults; all is used once here.
        self._source = _touched(self.bytes)
        self._target = _touched(self.bytes)

    def read(self, *, direct: bool) -> float:
        """Seconds to read all files, past the page cache or through it."""
        return self._on_threads(lambda index: self._read_file(index, direct))

    def copy(self) -> float:
        """Seconds to copy as many bytes from memory to memory, on one thread."""
        start = time.perf_counter()
        np.copyto(_array(self._target), _array(self._source))
        return time.perf_counter() - start

    def read_and_copy(self, *, direct: bool) -> float:
        """Seconds to read all files while each thread copies what it has read."""

        def work(index: int) -> None:
            self._read_file(index, direct)
            span = slice(index * self.file_bytes, (index + 1) * self.file_bytes)
            np.copyto(_array(self._target)[span], _array(self._source)[span])

        return self._on_threads(work)

    def _on_threads(self, work: Callable[[int], None]) -> float:
        with ThreadPoolExecutor(self._threads) as pool:
            # The threads exist before the clock runs.
            list(pool.map(lambda _: time.sleep(0.001), range(4 * self._threads)))
            start = time.perf_counter()
            list(pool.map(work, range(len(self._files))))
            return time.perf_counter() - start

    def _read_file(self, index: int, direct: bool) -> None:
        begin = index * self.file_bytes
        view = memoryview(self._source)[begin : begin + self.file_bytes]
        descriptor = os.open(self._files[index], os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            done = 0
            while done < self.file_bytes:
                count = os.preadv(descriptor, [view[done:]], done)
                if count <= 0:
                    raise OSError(f"{self._files[index]} ended at byte {done}")
                done += count
        finally:
            os.close(descriptor)
            view.release()


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """Asks the kernel to drop files from memory, so that they are read from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Only clean pages can be dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _touched(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    _array(memory)[::PAGE_BYTES] = 1
    return memory


def _array(memory: mmap.mmap) -> np.ndarray:
    return np.frombuffer(memory, dtype=np.uint8)
