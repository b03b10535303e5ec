"""KV cache in the memory of a GPU, on a mock whose device memory the CPU cannot touch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mock_gpu import MockGpu, build
from store_harness import (
    LIMIT_SECONDS,
    Geometry,
    HostMemory,
    config,
    load_chunks,
    lookup,
    namespace,
    open_store,
    store_chunks,
)

from kvrail import GpuError, KvCache, Store
from kvrail.kv_cache import KvMemory, LayerSpan

GEOMETRIES = {
    "layer outermost, gaps": Geometry(gap_bytes=512),
    "block outermost": Geometry(outer="block"),
    "a region for each layer": Geometry(separate=True),
    "layers of different sizes": Geometry(layer_bytes=(4096, 512, 12288)),
    "sizes that are no multiple of anything": Geometry(layer_bytes=(1000, 3, 77), gap_bytes=5),
    "pieces longer than one descriptor": Geometry(layer_bytes=(200_000,), blocks_per_chunk=2),
}


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo, to build the mock of libcuda")
    return build()


@pytest.fixture
def gpu(library: Path) -> Iterator[MockGpu]:
    mock = MockGpu(library, 1)
    yield mock
    mock.script("")


class DeviceMemory:
    """The regions of a ``HostMemory`` on a mock GPU."""

    def __init__(self, gpu: MockGpu, host: HostMemory) -> None:
        self._gpu, self._host = gpu, host
        self._spans = [(gpu.allocate(array.nbytes), array.nbytes) for array in host.arrays]
        self.send()

    def send(self) -> None:
        for (address, _), array in zip(self._spans, self._host.arrays, strict=True):
            self._gpu.write(address, array.tobytes())

    def fetch(self) -> None:
        """Brings what the device holds into the ``HostMemory``."""
        for (address, count), array in zip(self._spans, self._host.arrays, strict=True):
            array[:] = memoryview(self._gpu.read(address, count))

    def attach(self, store: Store) -> KvCache:
        return store.attach(
            self._host.layers,
            self._spans,
            self,
            block_count=self._host.geometry.block_count,
            blocks_per_chunk=self._host.geometry.blocks_per_chunk,
            device="cuda:1",
        )


def open_on_gpu(path: Path, library: Path) -> Store:
    return Store(config(path), namespace(), cuda_library=library)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_what_a_gpu_stored_a_host_loads_and_the_other_way_round(
    tmp_path: Path, gpu: MockGpu, library: Path, geometry: Geometry
) -> None:
    step = geometry.blocks_per_chunk
    sources = {index: list(range(index * step, (index + 1) * step)) for index in range(3)}
    targets = {index: list(range((index + 4) * step, (index + 5) * step)) for index in range(3)}
    source = HostMemory(geometry, seed=1)
    store = open_on_gpu(tmp_path / "gpu", library)
    stored = store_chunks(DeviceMemory(gpu, source).attach(store), sources)
    assert (stored.stored, stored.dropped, stored.failed) == (3, 0, 0)
    store.close(LIMIT_SECONDS)
    with open_store(tmp_path / "gpu") as store:
        assert lookup(store, range(3)) == 3
        host = HostMemory(geometry, seed=2)
        assert load_chunks(host.attach(store), targets).loaded == 3
        for index in range(3):
            assert host.blocks(targets[index]) == source.blocks(sources[index])
    with open_store(tmp_path / "host") as store:
        assert store_chunks(source.attach(store), sources).stored == 3
    store = open_on_gpu(tmp_path / "host", library)
    mirror = HostMemory(geometry, seed=3)
    before = mirror.copy()
    device = DeviceMemory(gpu, mirror)
    assert load_chunks(device.attach(store), targets).loaded == 3
    device.fetch()
    for index in range(3):
        assert mirror.blocks(targets[index]) == source.blocks(sources[index])
    assert mirror.untouched(before, [block for blocks in targets.values() for block in blocks])
    store.close(LIMIT_SECONDS)


def test_a_gpu_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, gpu: MockGpu, library: Path
) -> None:
    memory = DeviceMemory(gpu, HostMemory(Geometry(), seed=1))
    store = Store(config(tmp_path), namespace(), cuda_library="libkvrail-no-cuda.so.1")
    with pytest.raises(GpuError, match=r"cuda:1.*libkvrail-no-cuda\.so\.1"):
        memory.attach(store)
    store.close(LIMIT_SECONDS)
    store = open_on_gpu(tmp_path, library)
    gpu.script("cuStreamCreateWithPriority error=999")
    with pytest.raises(GpuError, match="cuStreamCreateWithPriority: 999"):
        memory.attach(store)
    gpu.script("")
    memory.attach(store)
    store.close(LIMIT_SECONDS)


def test_kv_memory_carries_its_device_to_the_store(
    tmp_path: Path, gpu: MockGpu, library: Path
) -> None:
    size = 4096 * 8
    address = gpu.allocate(size)
    spans = (LayerSpan(0, 0, 4096, 4096),)
    memory = KvMemory(spans, ((address, size),), None, 8, "cuda:1")
    store = open_on_gpu(tmp_path, library)
    kv_cache = memory.attach(store, blocks_per_chunk=2)
    gpu.write(address, bytes(range(256)) * (size // 256))
    assert store_chunks(kv_cache, {0: [0, 1]}).stored == 1
    gpu.write(address, bytes(size))
    assert load_chunks(kv_cache, {0: [6, 7]}).loaded == 1
    assert gpu.read(address, size) == bytes(6 * 4096) + bytes(range(256)) * 32
    store.close(LIMIT_SECONDS)
