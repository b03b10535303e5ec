"""When the connector asks for whole blocks."""

from pathlib import Path

import pytest
from vllm.config import ModelConfig

from kvrail._core import Config
from kvrail.vllm.direct import in_place_problem, wanted_layout


def _config(path: Path, extra: dict[str, object] | None = None, **top: object) -> Config:
    import json

    connector = {"gds_path": str(path), "extra_config": extra or {}, **top}
    return Config.resolve(json.dumps(connector), {}, None)


def _machine(folder: Path, *, has_nvidia_fs: bool = True) -> str:
    """A machine with an NVMe disk at ``/`` and, perhaps, nvidia-fs, as files."""
    nvme = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0"
    files = {
        "proc/modules": "nvme 1 2 - Live 0x0\n",
        "proc/self/mountinfo": "22 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n",
        "run/udev/data/b259:2": "E:ID_FS_TYPE=ext4\n",
        f"{nvme}/transport": "pcie\n",
        f"{nvme}/nvme0n1/nvme0n1p2/partition": "2\n",
    }
    if has_nvidia_fs:
        files |= {"proc/driver/nvidia-fs/version": "version: 2.26\n", "dev/nvidia-fs0": ""}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / nvme / "nvme0n1/device").symlink_to("../../nvme0")
    block = folder / "sys/dev/block/259:2"
    block.parent.mkdir(parents=True)
    block.symlink_to(f"../../../{nvme}/nvme0n1/nvme0n1p2")
    return str(folder)


def test_a_direct_path_is_worth_whole_blocks(tmp_path: Path) -> None:
    machine = _machine(tmp_path / "machine")
    config = _config(tmp_path / "not" / "there" / "yet")
    assert wanted_layout(config, True, None, machine) == "BLNHC"
    assert wanted_layout(config, False, None, machine) is None, "only CUDA has cuFile"


def test_without_one_the_choice_is_vllms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = _machine(tmp_path / "machine", has_nvidia_fs=False)
    with caplog.at_level("INFO", logger="vllm.kvrail.vllm.direct"):
        assert wanted_layout(_config(tmp_path), True, None, machine) is None
    assert "neither nvidia-fs nor P2PDMA" in caplog.text


@pytest.mark.parametrize(
    ("extra", "top"),
    [({"direct": False}, {}), ({"use_cufile": False}, {}), ({}, {"use_gds": False})],
)
def test_settings_forbid_it(
    tmp_path: Path, extra: dict[str, object], top: dict[str, object]
) -> None:
    machine = _machine(tmp_path / "machine")
    assert wanted_layout(_config(tmp_path, extra, **top), True, None, machine) is None


def test_a_setting_asks_for_it_in_any_case(tmp_path: Path) -> None:
    machine = _machine(tmp_path / "machine", has_nvidia_fs=False)
    config = _config(tmp_path, {"direct": True})
    assert wanted_layout(config, True, None, machine) == "BLNHC"


@pytest.mark.parametrize(("direct", "level"), [({}, "INFO"), ({"direct": True}, "WARNING")])
def test_memory_that_may_be_taken_away_is_never_used_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, direct: dict[str, object], level: str
) -> None:
    machine = _machine(tmp_path / "machine")
    problem = in_place_problem(ModelConfig.__new__(ModelConfig))
    assert problem is None
    model = ModelConfig.__new__(ModelConfig)
    # What vLLM sets itself with --enable-sleep-mode on a GPU.
    model.enable_cumem_allocator = True
    problem = in_place_problem(model)
    assert problem is not None
    with caplog.at_level("INFO", logger="vllm.kvrail.vllm.direct"):
        assert wanted_layout(_config(tmp_path, direct), True, problem, machine) is None
    assert [record.levelname for record in caplog.records] == [level]
    assert "enable_sleep_mode" in caplog.text
