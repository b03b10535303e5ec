"""What the checks need of a GPU: memory with views, a stream, and work on it.

``TorchGpu`` is PyTorch's CUDA. ``MockGpu`` is kvrail's mock of libcuda, whose device memory is
memory of the host behind addresses that the CPU must not touch; it runs work on a stream only when
somebody waits for it. The checks are the same for both.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from kvrail import cufile

from cases import Case


class Memory(Protocol):
    """The KV cache of a case on a GPU. Work is put on one stream, in order."""

    stream: int
    views: list[Any]

    def send(self, content: torch.Tensor) -> None:
        """Puts a copy of `content`, bytes of the host, to the whole KV cache on the stream."""

    def overwrite(self, blocks: list[int]) -> None:
        """Puts a change of all bytes of `blocks` on the stream."""

    def put(self, block: int, content: torch.Tensor) -> None:
        """Puts a copy of `content`, bytes of the host, to a block on the stream, layer by layer."""

    def compute(self) -> None:
        """Puts work that does not concern the KV cache on the stream; it takes a while."""

    def computed_right(self) -> bool:
        """Whether all of that work since the last call had the right result; waits for it."""

    def fetch(self) -> torch.Tensor:
        """The whole KV cache in memory of the host, when the stream is done."""


class Gpu(Protocol):
    """One device."""

    name: str
    # Arguments of ``Store``: where the libraries lie, and how cuFile is tried.
    store_options: dict[str, Any]

    def memory(self, case: Case) -> Memory:
        """A KV cache whose bytes nobody has set."""


class TorchGpu:
    """A device of PyTorch."""

    def __init__(self, ordinal: int) -> None:
        """Takes the device. Raises RuntimeError where PyTorch has none."""
        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA device")
        self._device = torch.device("cuda", ordinal)
        self._count = 0
        torch.cuda.set_device(self._device)
        self.name = torch.cuda.get_device_name(self._device)
        self.store_options = cufile.store_options()

    def memory(self, case: Case) -> Memory:
        """A KV cache; every other one is used on a stream of its own, the rest on the default."""
        self._count += 1
        stream = torch.cuda.default_stream(self._device)
        if self._count % 2 == 0:
            stream = torch.cuda.Stream(self._device)
        return TorchMemory(case, self._device, stream)


class TorchMemory:
    """A KV cache in a tensor of PyTorch."""

    # A product of matrices of this size takes a few hundred microseconds on a data-centre GPU.
    _MATRIX = 4096
    _PRODUCTS = 8

    def __init__(self, case: Case, device: torch.device, stream: Any) -> None:
        """Allocates as vLLM does: one buffer of bytes, and views of it."""
        self._case = case
        self._stream = stream
        self._storage = torch.empty(case.storage_bytes, dtype=torch.int8, device=device)
        self.views = layer_views(case, self._storage)
        self.stream = stream.cuda_stream
        # Whole numbers below 16: sums of 4096 products are exact in float32.
        shape = (self._MATRIX, self._MATRIX)
        self._matrix = torch.randint(0, 16, shape, device=device).to(torch.float32)
        self._expected = self._matrix @ self._matrix
        self._results: list[torch.Tensor] = []
        self._sent: list[torch.Tensor] = []
        # All of that was put on the default stream.
        torch.cuda.current_stream(device).synchronize()

    def send(self, content: torch.Tensor) -> None:
        """See ``Memory``."""
        pinned = content.pin_memory()
        with torch.cuda.stream(self._stream):
            self._storage.copy_(pinned, non_blocking=True)
        self._sent.append(pinned)

    def overwrite(self, blocks: list[int]) -> None:
        """See ``Memory``."""
        with torch.cuda.stream(self._stream):
            for view in self.views:
                for block in blocks:
                    bytes_of = view[block].view(torch.int8)
                    bytes_of.bitwise_not_()

    def put(self, block: int, content: torch.Tensor) -> None:
        """See ``Memory``."""
        pinned = content.pin_memory()
        start = 0
        with torch.cuda.stream(self._stream):
            for offset, count in self._case.spans(block):
                target = self._storage[offset : offset + count]
                target.copy_(pinned[start : start + count], non_blocking=True)
                start += count
        self._sent.append(pinned)

    def compute(self) -> None:
        """See ``Memory``."""
        with torch.cuda.stream(self._stream):
            for _ in range(self._PRODUCTS):
                result = self._matrix @ self._matrix
            self._results.append(result)

    def computed_right(self) -> bool:
        """See ``Memory``."""
        self._stream.synchronize()
        right = all(torch.equal(result, self._expected) for result in self._results)
        self._results.clear()
        return right

    def fetch(self) -> torch.Tensor:
        """See ``Memory``."""
        self._stream.synchronize()
        self._sent.clear()
        return self._storage.cpu()


def layer_views(case: Case, storage: torch.Tensor) -> list[torch.Tensor]:
    """A view of `storage` for each layer."""
    typed = storage.view(getattr(torch, case.dtype))
    step = case.strides["L"]
    return [
        typed.as_strided(case.shape, case.view_strides, layer * step)
        for layer in range(case.layers)
    ]
