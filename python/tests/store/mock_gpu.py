"""A mock of libcuda, built from this checkout, and memory of its devices."""

import ctypes
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_NAME = "libmock_libcuda.so"


def build() -> Path:
    """Builds the mock in release mode and returns its path."""
    subprocess.run(
        ["cargo", "build", "--quiet", "--locked", "--release", "-p", "mock-libcuda"],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / _NAME


class MockGpu:
    """One device of the mock."""

    def __init__(self, library: Path, ordinal: int) -> None:
        """Takes the device's primary context."""
        self._cuda = ctypes.CDLL(str(library))
        self._cuda.kvrail_mock_translate.restype = ctypes.c_void_p
        self._cuda.kvrail_mock_translate.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    def allocate(self, count: int) -> int:
        """Returns the address of `count` bytes, which the CPU must not touch."""
        address = ctypes.c_uint64()
        self._call("cuCtxPushCurrent_v2", self._context)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return address.value

    def write(self, address: int, content: bytes) -> None:
        """Puts bytes into device memory."""
        ctypes.memmove(self._alias(address, len(content)), content, len(content))

    def read(self, address: int, count: int) -> bytes:
        """Returns bytes of device memory."""
        return ctypes.string_at(self._alias(address, count), count)

    def script(self, text: str) -> None:
        """Sets the faults (see crates/mock-script)."""
        assert self._cuda.kvrail_mock_script(text.encode()) == 0, text

    def _alias(self, address: int, count: int) -> int:
        alias = self._cuda.kvrail_mock_translate(address, count)
        assert alias, f"{count} bytes at {address:#x} are no device memory"
        return int(alias)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._cuda, function)(*arguments)
        assert status == 0, f"{function}: {status}"
