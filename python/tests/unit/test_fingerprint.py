"""Fingerprints of weights: equal for copies, different for anything trained or exchanged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvrail.vllm import fingerprint as module
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
    assert known.of(adapter(model)) == first
    change_head(model)
    assert AdapterFingerprints().of(adapter(model)) not in (None, first)
    assert known.of(adapter(model, load_inplace=True)) is None
    assert known.of(adapter(tmp_path / "gone")) is None


def touch(model):
    os.utime(model / "two.safetensors", ns=(1, 1))


def replace_in_place(model):
    """A copy of other content, with the size and the time of what was there."""
    file = model / "two.safetensors"
    before = file.stat()
    other = model / "new"
    other.write_bytes(b"SMALL")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def add(model):
    (model / "three.safetensors").write_bytes(b"more")


def remove_all(model):
    shutil.rmtree(model)


@pytest.mark.parametrize(
    "change",
    [change_config, touch, replace_in_place, grow, rename, remove, add, remove_all],
)
def test_an_adapter_whose_files_change_is_left_alone_from_then_on(model, tmp_path, caplog, change):
    """vLLM may have loaded them again, or not: it does so when it had no room for an adapter."""
    known = AdapterFingerprints()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    assert known.of(adapter(model)) == known.of(adapter(other)) is not None
    change(model)
    for _ in range(2):
        assert known.of(adapter(model)) is None
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(kept, model)
    assert known.of(adapter(model)) is None, "also with what was there before"
    # Its blocks in vLLM's prefix cache have the hashes of those of the one before.
    again = SimpleNamespace(lora_name="a", lora_path=str(model), lora_int_id=2)
    assert known.of(again) is None
    assert known.of(adapter(other)) is not None
    [message] = [record.getMessage() for record in caplog.records]
    assert "the adapter a in" in message and str(model) in message
    assert "neither stored nor loaded until vLLM restarts" in message


def test_an_adapter_whose_files_change_while_they_are_read_is_left_alone(model, monkeypatch):
    def read(path):
        fingerprint = fingerprint_path(path)
        grow(path)
        return fingerprint

    monkeypatch.setattr(module, "fingerprint_path", read)
    known = AdapterFingerprints()
    assert known.of(adapter(model)) is None
    monkeypatch.undo()
    assert known.of(adapter(model)) is None


def test_no_more_adapters_than_the_bound_are_known(model, tmp_path, monkeypatch):
    """Those that are known stay: forgotten ones would be read anew, with whatever is there then."""
    monkeypatch.setattr(module, "ADAPTERS_MAX", 1)
    known = AdapterFingerprints()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    first = known.of(adapter(model))
    assert first is not None
    assert known.of(adapter(other)) is None
    assert known.of(adapter(model)) == first


KV_SCALES = [
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.v_proj.v_scale",
    "model.layers.0.self_attn.k_proj.output_scale",
    "model.layers.0.self_attn.qkv_proj.k_scale",
    "model.layers.0.self_attn.kv_scale",
    "model.layers.0.self_attn.v_cache.scale",
    "model.layers.0.mixer.k_proj.k_scale",
]


@pytest.mark.parametrize("name", KV_SCALES)
def test_a_kv_cache_that_is_calibrated_anew_is_seen_in_any_file(tmp_path, name):
    """Two bytes somewhere between the pages that are sampled."""
    folder = tmp_path / "model"
    folder.mkdir()

    def fingerprint(scale: float) -> str:
        tensors = {
            "a.weight": torch.zeros(1_000_000, dtype=torch.float32),
            name: torch.tensor([scale], dtype=torch.bfloat16),
            "z.weight": torch.zeros(1_700_000, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / "model.safetensors")
        return fingerprint_path(folder)

    assert fingerprint(1.0) == fingerprint(1.0)
    assert fingerprint(1.0) != fingerprint(2.0)


def test_a_file_that_only_says_that_it_is_safetensors_is_sampled_all_the_same(model):
    for head in (b"", b"\xff" * 8, (20).to_bytes(8, "little") + b"[1, 2, 3]           "):
        (model / "two.safetensors").write_bytes(head)
        assert len(fingerprint_path(model)) == 64
