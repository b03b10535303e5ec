"""The udev records that scripts/gpu-check writes where a machine has none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import udev


def device_number(directory: Path) -> str:
    device = os.stat(directory).st_dev
    if os.major(device) == 0:
        pytest.skip(f"{directory} lies on no block device")
    return f"{os.major(device)}:{os.minor(device)}"


def machine(root: Path, number: str) -> Path:
    mounts = root / "proc/self/mountinfo"
    mounts.parent.mkdir(parents=True)
    mounts.write_text(
        "20 1 0:19 / /proc rw shared:1 - proc proc rw\n"
        f"22 1 {number} / / rw,relatime - xfs /dev/vda rw\n"
    )
    return root / f"run/udev/data/b{number}"


def test_a_record_is_there_for_the_time_of_the_run(tmp_path: Path) -> None:
    record = machine(tmp_path, device_number(tmp_path))
    with udev.records([tmp_path, tmp_path], root=tmp_path) as written:
        assert written == [record.relative_to(tmp_path)]
        assert record.read_text() == "E:ID_FS_TYPE=xfs\nE:ID_FS_USAGE=filesystem\n"
    assert not record.exists()


def test_a_record_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    record = machine(tmp_path, device_number(tmp_path))
    record.parent.mkdir(parents=True)
    record.write_text("E:ID_FS_TYPE=ext4\n")
    with udev.records([tmp_path], root=tmp_path) as written:
        assert written == []
    assert record.read_text() == "E:ID_FS_TYPE=ext4\n"


def test_what_lies_on_no_known_device_gets_none(tmp_path: Path) -> None:
    machine(tmp_path, "1:99")
    with (
        pytest.raises(udev.RecordError, match="no block device of its own"),
        udev.records([tmp_path], root=tmp_path),
    ):
        pass
    assert not (tmp_path / "run").exists()
