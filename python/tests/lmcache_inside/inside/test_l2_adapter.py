"""The L2 adapter, made by LMCache's own factory and driven as its controllers do."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache_slab import SHAPE, Driver, bits, key

sys.path.append(str(Path(__file__).resolve().parents[2] / "e2e"))
from faulty_mount import CannotMountError, FaultyMount


def chunk_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kv").glob("*/g0r*/*/*.safetensors"))


def damage(path: Path) -> None:
    """Changes one byte in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_objects_come_back_after_a_restart_at_other_addresses(
    adapters: Callable[..., Driver], l1: Any, tmp_path: Path
) -> None:
    keys = [key(index) for index in range(8)]
    objects = [l1.random(index) for index in range(8)]
    first = adapters()
    assert first.lookup(keys) == [False] * 8
    result = first.store(keys, objects)
    size = objects[0].get_size()
    assert result.is_successful() and result.bytes_transferred() == 8 * size
    assert len(chunk_files(tmp_path)) == 8
    assert first.adapter.get_usage().total_bytes_used == 8 * size
    again = first.store(keys[:2], objects[:2])
    assert again.is_successful() and again.bytes_transferred() == 0
    first.adapter.close()

    second = adapters()
    asked = [keys[3], key(99), keys[5]]
    assert second.lookup(asked) == [True, False, True]
    targets = [l1.allocate() for _ in asked]
    assert second.load(asked, targets) == [True, False, True]
    assert torch.equal(l1.bytes(targets[0]), l1.bytes(objects[3]))
    assert torch.equal(l1.bytes(targets[2]), l1.bytes(objects[5]))
    assert not l1.bytes(targets[1]).any()


def test_a_damaged_file_is_a_miss_for_its_key_only_and_is_set_aside(
    adapters: Callable[..., Driver], l1: Any, tmp_path: Path
) -> None:
    keys = [key(index) for index in range(4)]
    objects = [l1.random(index) for index in range(4)]
    driver = adapters()
    assert driver.store(keys, objects).is_successful()
    (bad,) = [path for path in chunk_files(tmp_path) if path.stem == keys[2].chunk_hash.hex()]
    damage(bad)
    targets = [l1.allocate() for _ in keys]
    assert driver.load(keys, targets) == [True, True, False, True]
    assert not bad.exists() and list((tmp_path / "kv").glob("*/quarantine/*.safetensors"))
    # Each page is verified before it is copied: those before the bad one may have been.
    found, original = l1.bytes(targets[2]), l1.bytes(objects[2])
    assert not ((found != original) & (found != 0)).any(), "a wrong byte was loaded"
    assert not torch.equal(found, original)
    assert driver.lookup(keys) == [True, True, False, True]
    assert driver.store(keys[2:3], objects[2:3]).bytes_transferred() == objects[2].get_size()
    assert driver.load(keys[2:3], targets[2:3]) == [True]
    assert driver.adapter.report_status()["metrics"]["chunks_damaged"] == 1


def test_salts_ranks_groups_models_and_layouts_are_apart(
    adapters: Callable[..., Driver], l1: Any
) -> None:
    driver = adapters()
    same_hash = [
        key(1),
        key(1, cache_salt="anna"),
        key(1, cache_salt="ben"),
        key(1, kv_rank=0x02010201),
        key(1, model_name="org/other"),
    ]
    objects = [l1.random(index) for index in range(len(same_hash))]
    assert driver.store(same_hash, objects).is_successful()
    targets = [l1.allocate() for _ in same_hash]
    assert all(driver.load(same_hash, targets))
    for target, original in zip(targets, objects, strict=True):
        assert torch.equal(l1.bytes(target), l1.bytes(original))
    # As long, and of another type: the same model served with another KV cache.
    other = l1.allocate(SHAPE, torch.float16)
    assert driver.load([key(1)], [other]) == [False]
    shorter = l1.random(9, torch.Size([2, 4, 64, 96]))
    assert driver.load([key(1)], [shorter]) == [False]
    assert driver.store([key(1)], [shorter]).is_successful()
    assert driver.load([key(1)], targets[:1]) == [True]
    assert torch.equal(l1.bytes(targets[0]), l1.bytes(objects[0]))


def test_a_lookup_without_layouts_goes_by_what_was_seen(
    adapters: Callable[..., Driver], l1: Any
) -> None:
    driver = adapters()
    assert driver.lookup([key(1)], layout=False) == [False]
    assert driver.store([key(1)], [l1.random(1)]).is_successful()
    assert driver.lookup([key(1)], layout=False) == [True]


def test_deleted_objects_are_gone(adapters: Callable[..., Driver], l1: Any, tmp_path: Path) -> None:
    driver = adapters()
    keys = [key(index) for index in range(3)]
    assert driver.store(keys, [l1.random(index) for index in range(3)]).is_successful()
    driver.adapter.delete([keys[1], key(50)])
    assert len(chunk_files(tmp_path)) == 2
    assert driver.lookup(keys) == [True, False, True]


def test_a_full_directory_is_no_error(adapters: Callable[..., Driver], l1: Any) -> None:
    size = l1.allocate().get_size()
    driver = adapters(max_size=2 * size, low_watermark=0.5)
    keys = [key(index) for index in range(6)]
    result = driver.store(keys, [l1.random(index) for index in range(6)])
    assert not result.is_successful() and 0 < result.bytes_transferred() + size < 6 * size
    found = driver.lookup(keys)
    targets = [l1.allocate() for _ in keys]
    loaded = driver.load(keys, targets)
    assert loaded == found and 0 < sum(loaded) < 6


def test_a_full_disk_is_no_error(adapters: Callable[..., Driver], l1: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)],
        stderr=subprocess.PIPE,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        driver = adapters(gds_path=str(small / "kv"), min_free=0)
        keys = [key(index) for index in range(6)]
        objects = [l1.random(index) for index in range(6)]
        assert not driver.store(keys, objects).is_successful()
        found = driver.lookup(keys)
        targets = [l1.allocate() for _ in keys]
        assert driver.load(keys, targets) == found and 0 < sum(found) < 6
        for target, original, is_there in zip(targets, objects, found, strict=True):
            assert torch.equal(l1.bytes(target), l1.bytes(original)) == is_there
        driver.adapter.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_mount_that_hangs_is_waited_for_within_limits(
    adapters: Callable[..., Driver], l1: Any, tmp_path: Path
) -> None:
    """Every task ends, as a miss, and what was stored is found again when the mount is well."""
    wait, lookup = 1.5, 0.5
    # The watch looks ten times a second; the rest is for a busy machine.
    slack = 2.0
    try:
        mount = FaultyMount(tmp_path, seed=6)
    except CannotMountError as error:
        pytest.skip(f"cannot mount a faulty file system: {error}")
    try:
        limits = {"wait_limit_seconds": wait, "lookup_limit_seconds": lookup}
        driver = adapters(gds_path=str(mount.path), extra_config=limits)
        keys = [key(index) for index in range(4)]
        objects = [l1.random(index) for index in range(4)]
        new = [key(index) for index in range(4, 8)]
        assert driver.store(keys, objects).is_successful()
        assert driver.lookup(keys) == [True] * 4
        mount.set("* *-* hang")
        targets = [l1.allocate() for _ in keys]
        for what, bound, work in (
            ("load", wait, lambda: any(driver.load(keys, targets))),
            ("lookup", lookup + wait, lambda: any(driver.lookup(keys))),
            ("store", wait, lambda: driver.store(new, objects).is_successful()),
            ("delete", wait, lambda: driver.adapter.delete(new)),
        ):
            start = time.monotonic()
            assert not work(), what
            seconds = time.monotonic() - start
            print(f"{what}: {seconds:.2f} s with the limit {bound} s")
            assert seconds < bound + slack, what
        assert mount.hits() > 0
        mount.set("")
        deadline = time.monotonic() + 25
        while driver.lookup(keys) != [True] * 4:
            assert time.monotonic() < deadline, "what was stored is not found again"
            time.sleep(0.2)
        assert driver.load(keys, targets) == [True] * 4
        for target, original in zip(targets, objects, strict=True):
            assert torch.equal(l1.bytes(target), l1.bytes(original))
        mount.set("* *-* hang")
        driver.load(keys, targets)
        start = time.monotonic()
        driver.adapter.close()
        assert time.monotonic() - start < 4 * wait + slack
    finally:
        mount.unmount()


def test_two_adapters_share_a_directory(adapters: Callable[..., Driver], l1: Any) -> None:
    one, other = adapters(), adapters()
    stored = l1.random(1)
    assert one.store([key(1)], [stored]).is_successful()
    assert other.lookup([key(1)]) == [True]
    target = l1.allocate()
    assert other.load([key(1)], [target]) == [True]
    assert torch.equal(l1.bytes(target), l1.bytes(stored))


def test_many_threads_at_once(adapters: Callable[..., Driver], l1: Any) -> None:
    """Tasks of four threads. Events do not say whose they are, so results are polled."""
    driver = adapters()
    objects = [l1.random(index) for index in range(32)]
    assert driver.store([key(index) for index in range(32)], objects).is_successful()
    failures: list[str] = []

    def work(first: int) -> None:
        target = l1.allocate()
        pause = threading.Event()
        for index in range(first, 32, 4):
            task = driver.adapter.submit_load_task([key(index)], [target])
            for _ in range(3000):
                loaded = driver.adapter.query_load_result(task)
                if loaded is not None:
                    break
                pause.wait(0.01)
            if loaded is None or bits(loaded, 1) != [True]:
                failures.append(f"{index}: not loaded")
            elif not torch.equal(l1.bytes(target), l1.bytes(objects[index])):
                failures.append(f"{index}: other bytes")

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_store_that_cannot_be_opened_is_a_miss(
    adapters: Callable[..., Driver], l1: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    driver = adapters(gds_path=str(tmp_path / "file"))
    assert not driver.store([key(1)], [l1.random(1)]).is_successful()
    assert driver.lookup([key(1)]) == [False]
    assert driver.load([key(1)], [l1.allocate()]) == [False]


def test_after_the_end_all_is_missed(adapters: Callable[..., Driver], l1: Any) -> None:
    driver = adapters()
    assert driver.store([key(1)], [l1.random(1)]).is_successful()
    driver.adapter.close()
    driver.adapter.close()
    assert driver.load([key(1)], [l1.allocate()]) == [False]
    assert driver.lookup([key(1)]) == [False]
    assert not driver.store([key(2)], [l1.random(2)]).is_successful()
    assert not driver.adapter.report_status()["is_healthy"]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"max_size": -1}, "max_size"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"chunk_size": 256}, "chunk_size"),
        ({"path": "/elsewhere"}, "path"),
        ({"gds_path": 7}, "gds_path"),
    ],
)
def test_wrong_settings_are_named(
    adapters: Callable[..., Driver], params: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        adapters(**params)
