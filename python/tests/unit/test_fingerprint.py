"""Fingerprints of weights: equal for copies, different for anything trained or exchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvrail.vllm.fingerprint import (
    AdapterFingerprints,
    FingerprintError,
    fingerprint_path,
    resolve_model_path,
)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "one.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "two.safetensors").write_bytes(b"small")
    (folder / "README.md").write_text("about")
    return folder


def test_a_copy_elsewhere_is_the_same(model, tmp_path):
    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("other words")
    assert fingerprint_path(copy) == fingerprint_path(model)


def change_config(model):
    (model / "config.json").write_text('{"hidden_size": 9}')


def change_head(model):
    file = model / "one.safetensors"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])


def change_tail(model):
    file = model / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")


def change_one_64th(model):
    file = model / "one.safetensors"
    data = bytearray(file.read_bytes())
    start = len(data) // 2
    data[start : start + len(data) // 63 + 1] = bytes(len(data) // 63 + 1)
    file.write_bytes(data)


def grow(model):
    with (model / "two.safetensors").open("ab") as stream:
        stream.write(b"\x00")


def rename(model):
    (model / "two.safetensors").rename(model / "three.safetensors")


def remove(model):
    (model / "two.safetensors").unlink()


@pytest.mark.parametrize(
    "change", [change_config, change_head, change_tail, change_one_64th, grow, rename, remove]
)
def test_a_change_is_seen(model, change):
    before = fingerprint_path(model)
    change(model)
    assert fingerprint_path(model) != before


def test_a_single_file_is_a_model(model):
    file = model / "one.safetensors"
    assert fingerprint_path(file) != fingerprint_path(model)


def test_no_weights_is_an_error(tmp_path):
    with pytest.raises(FingerprintError, match="no weight files"):
        fingerprint_path(tmp_path)


def test_a_model_that_is_not_here(tmp_path):
    with pytest.raises(FingerprintError, match="no local files of the model nobody/nothing"):
        resolve_model_path("nobody/nothing", None, str(tmp_path))


def adapter(path, **fields):
    return SimpleNamespace(lora_name="a", lora_path=str(path), lora_int_id=1, **fields)


def test_adapters(model, tmp_path):
    known = AdapterFingerprints()
    first = known.of(adapter(model))
    assert first is not None
    assert len(first) == 32
    change_head(model)
    assert known.of(adapter(model)) == first, "the engine keeps what it loaded"
    assert AdapterFingerprints().of(adapter(model)) != first
    assert known.of(adapter(model, load_inplace=True)) is None
    assert known.of(adapter(tmp_path / "gone")) is None
