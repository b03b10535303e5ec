"""The mock of libcuda in the place of PyTorch's CUDA, for tests of the checks themselves."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvrail
import torch
from kvrail import cufile

from cases import Case


class MockGpu:
    """One device of the mock libraries in a folder."""

    def __init__(self, folder: Path, system_root: Path, ordinal: int) -> None:
        """Takes the device's primary context."""
        self.name = "mock"
        self.ordinal = ordinal
        library = str(folder / "libmock_libcuda.so")
        self.store_options: dict[str, Any] = {
            **cufile.store_options(),
            "cuda_library": library,
            "cufile_libraries": [str(folder / "libmock_libcufile.so")],
            "system_root": str(system_root),
        }
        # The command starts quicker than Python, and there are many stores.
        command = Path(kvrail.__file__).parents[1] / "bin" / "kvrail"
        if command.is_file():
            self.store_options["cufile_probe"] = [str(command), "cufile-probe"]
        self.library = ctypes.CDLL(library)
        self.library.kvrail_mock_translate.restype = ctypes.c_void_p
        self.library.kvrail_mock_translate.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)
        self.call("cuCtxPushCurrent_v2", self._context)

    def memory(self, case: Case) -> MockMemory:
        """See ``Gpu``."""
        return MockMemory(self, case)

    def allocate(self, count: int) -> int:
        """The address of `count` bytes that the CPU must not touch."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        return address.value

    def alias(self, address: int, count: int) -> int:
        """Where the CPU may touch them."""
        found = self.library.kvrail_mock_translate(address, count)
        assert found, f"{count} bytes at {address:#x} are no device memory"
        return int(found)

    def call(self, function: str, *arguments: object) -> None:
        """Calls a function of the driver; raises RuntimeError with what it answers."""
        status = getattr(self.library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function}: {status}")


@dataclass(frozen=True)
class _Device:
    type: str
    index: int


@dataclass(frozen=True)
class _Storage:
    address: int
    count: int

    def data_ptr(self) -> int:
        return self.address

    def nbytes(self) -> int:
        return self.count


@dataclass(frozen=True)
class View:
    """As much of a tensor as ``kvrail.kv_cache.from_tensors`` looks at."""

    case: Case
    storage: _Storage
    layer: int
    device: _Device

    @property
    def shape(self) -> tuple[int, ...]:
        """See torch.Tensor."""
        return self.case.shape

    def stride(self) -> tuple[int, ...]:
        """See torch.Tensor."""
        return self.case.view_strides

    def element_size(self) -> int:
        """See torch.Tensor."""
        return self.case.item_bytes

    def data_ptr(self) -> int:
        """See torch.Tensor."""
        offset = self.layer * self.case.strides["L"] * self.case.item_bytes
        return self.storage.address + offset

    def untyped_storage(self) -> _Storage:
        """See torch.Tensor."""
        return self.storage


class MockMemory:
    """A KV cache in memory of the mock, used on a stream of its own."""

    _SCRATCH_BYTES = 1 << 16
    _COPIES = 20

    def __init__(self, gpu: MockGpu, case: Case) -> None:
        """Allocates the KV cache, a source for what overwrites it, and memory to work on."""
        self._gpu, self._case = gpu, case
        handle = ctypes.c_void_p()
        gpu.call("cuStreamCreateWithPriority", ctypes.byref(handle), 1, 0)
        self._handle, self.stream = handle, int(handle.value or 0)
        self._address = gpu.allocate(case.storage_bytes)
        self._noise = gpu.allocate(case.storage_bytes)
        ctypes.memset(gpu.alias(self._noise, case.storage_bytes), 0x5A, case.storage_bytes)
        self._scratch = [gpu.allocate(self._SCRATCH_BYTES) for _ in range(2)]
        self._rounds = 0
        storage = _Storage(self._address, case.storage_bytes)
        device = _Device("cuda", gpu.ordinal)
        self.views: list[Any] = [View(case, storage, layer, device) for layer in range(case.layers)]
        self._sent: list[torch.Tensor] = []

    def send(self, content: torch.Tensor) -> None:
        """See ``Memory``."""
        kept = self._keep(content.clone())
        self._send(self._address, kept.data_ptr(), kept.nbytes)

    def put(self, block: int, content: torch.Tensor) -> None:
        """See ``Memory``."""
        source = self._keep(content.clone()).data_ptr()
        for offset, count in self._case.spans(block):
            self._send(self._address + offset, source, count)
            source += count

    def overwrite(self, blocks: list[int]) -> None:
        """See ``Memory``."""
        for block in blocks:
            for offset, count in self._case.spans(block):
                self._copy(self._address + offset, self._noise + offset, count)

    def compute(self) -> None:
        """See ``Memory``: a pattern goes from one place to the other and back."""
        self._rounds += 1
        first, second = self._scratch
        pattern = torch.full((self._SCRATCH_BYTES,), self._rounds % 128, dtype=torch.int8)
        self._send(first, self._keep(pattern).data_ptr(), self._SCRATCH_BYTES)
        for _ in range(self._COPIES):
            self._copy(second, first, self._SCRATCH_BYTES)
            self._copy(first, second, self._SCRATCH_BYTES)

    def computed_right(self) -> bool:
        """See ``Memory``."""
        self._synchronize()
        found = self._read(self._scratch[1], self._SCRATCH_BYTES)
        return self._rounds == 0 or bool((found == self._rounds % 128).all())

    def fetch(self) -> torch.Tensor:
        """See ``Memory``."""
        self._synchronize()
        self._sent.clear()
        return self._read(self._address, self._case.storage_bytes)

    def _keep(self, bytes_of: torch.Tensor) -> torch.Tensor:
        """Keeps memory of the host until the stream is done with it."""
        self._sent.append(bytes_of)
        return bytes_of

    def _send(self, target: int, source: int, count: int) -> None:
        self._gpu.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(count),
            self._handle,
        )

    def _read(self, address: int, count: int) -> torch.Tensor:
        found = bytearray(ctypes.string_at(self._gpu.alias(address, count), count))
        return torch.frombuffer(found, dtype=torch.int8)

    def _copy(self, target: int, source: int, count: int) -> None:
        self._gpu.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(count),
            self._handle,
        )

    def _synchronize(self) -> None:
        self._gpu.call("cuStreamSynchronize", self._handle)
