"""Where the configuration comes from."""

from __future__ import annotations

import json

import pytest

from kvrail._core import ConfigError
from kvrail.vllm import config as module
from kvrail.vllm.config import (
    effective_value,
    read_config_file,
    resolve_config,
    with_fitting_chunks,
)


def test_the_file_of_kvrail_ranks_above_that_of_lmcache(tmp_path):
    ours, theirs = tmp_path / "ours.yaml", tmp_path / "theirs.yaml"
    ours.write_text("chunk_size: 512\n")
    theirs.write_text("chunk_size: 128\n")
    environment = {"LMCACHE_CONFIG_FILE": str(theirs)}
    assert read_config_file(environment) == (str(theirs), "chunk_size: 128\n")
    environment["KVRAIL_CONFIG_FILE"] = str(ours)
    assert read_config_file(environment) == (str(ours), "chunk_size: 512\n")
    assert read_config_file({"KVRAIL_CONFIG_FILE": ""}) is None


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=r"`LMCACHE_CONFIG_FILE` = .*missing\.yaml: expected"):
        read_config_file({"LMCACHE_CONFIG_FILE": str(missing)})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected a readable YAML file"):
        read_config_file({"LMCACHE_CONFIG_FILE": str(binary)})


def test_precedence(tmp_path):
    file = tmp_path / "gds.yaml"
    file.write_text(f"gds_path: {tmp_path}\nchunk_size: 128\ncufile_buffer_size: 64\n")
    environment = {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_CHUNK_SIZE": "256", "PATH": "/bin"}
    config = resolve_config(None, environment)
    assert (config.chunk_size, config.buffer_mib) == (256, 64)
    assert config.gds_path == [str(tmp_path)]
    assert effective_value(config, "extra_config.wait_limit_seconds") == 30.0
    assert resolve_config({"chunk_size": 512}, environment).chunk_size == 512


def test_warnings_are_logged_once_per_process(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(module, "_logged_warnings", set())
    monkeypatch.setattr(module.logger, "warning", lambda text, *rest: lines.append(text % rest))
    file = tmp_path / "gds.yaml"
    file.write_text(f"gds_path: {tmp_path}\nremote_serde: naive\n")
    for _ in range(2):
        resolve_config({}, {"LMCACHE_CONFIG_FILE": str(file)})
    assert len(lines) == 1
    assert "remote_serde" in lines[0]


def test_a_connector_configuration_that_is_no_json():
    with pytest.raises(ConfigError, match="kv_connector_extra_config"):
        resolve_config({"gds_path": object()}, {})
    with pytest.raises(ConfigError):
        resolve_config({"chunk_size": json.loads("[1]")}, {"LMCACHE_GDS_PATH": "/nowhere"})


def test_a_chunk_size_that_nobody_set_fits_the_model():
    def fit(size: int) -> int:
        return -(-size // 528) * 528

    unset = resolve_config({"gds_path": "/kv"}, {})
    assert with_fitting_chunks(unset, {"gds_path": "/kv"}, fit, {}).chunk_size == 528
    assert with_fitting_chunks(unset, {"gds_path": "/kv"}, lambda size: size, {}) is unset
    settings = {"gds_path": "/kv", "chunk_size": 256}
    chosen = resolve_config(settings, {})
    assert with_fitting_chunks(chosen, settings, fit, {}) is chosen
    environment = {"LMCACHE_CHUNK_SIZE": "256"}
    chosen = resolve_config({"gds_path": "/kv"}, environment)
    assert with_fitting_chunks(chosen, {"gds_path": "/kv"}, fit, environment) is chosen
