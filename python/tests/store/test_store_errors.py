"""Wrong settings and arguments: the class of the exception and what its message names."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from store_harness import Geometry, HostMemory, config, key, namespace, open_store

import kvrail._core as core
from kvrail._core import Config, ConfigError, KvrailError, Namespace, Store


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"chunk_sise": 256}, "chunk_size"),
        ({"chunk_size": "many"}, "`chunk_size` = "),
        ({"chunk_size": 0}, "`chunk_size` = 0: expected"),
        ({"gds_path": "relative/path"}, "absolute"),
        ({"gds_path": None}, "`gds_path` = nothing: expected"),
        ({"cufile_buffer_size": -1}, "`cufile_buffer_size` = -1: expected"),
        ({"extra_config": {"disk_io_threads": 0}}, "disk_io_threads` = 0: expected"),
        ({"extra_config": "[]"}, "extra_config"),
    ],
    ids=str,
)
def test_a_wrong_setting_names_key_value_and_what_was_expected(
    settings: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        config("/kv", **settings)
    assert expected in str(raised.value)
    assert isinstance(raised.value, KvrailError) and isinstance(raised.value, ValueError)


@pytest.mark.parametrize("text", ["{", "[]", '"text"'])
def test_connector_settings_that_are_no_object(text: str) -> None:
    with pytest.raises(ConfigError, match="kv_connector_extra_config"):
        Config.resolve(text, {}, None)


def test_a_file_that_is_no_yaml_mapping() -> None:
    for text in ("- a\n- b\n", "a: [1,\n"):
        with pytest.raises(ConfigError, match=r"settings\.yaml"):
            Config.resolve(None, {}, ("settings.yaml", text))


def test_sources_rank_and_every_key_tells_its_origin() -> None:
    environment = {
        "LMCACHE_CHUNK_SIZE": "64",
        "KVRAIL_CHUNK_SIZE": "128",
        "LMCACHE_SAVE_DECODE_CACHE": "True",
        "UNRELATED": "value",
    }
    text = "gds_path: /from/file\nchunk_size: 32\nsave_decode_cache: false\nmax_size: 1000\n"
    connector = json.dumps({"gds_path": "/a,/b", "extra_config": {"load_failure_policy": "fail"}})
    resolved = Config.resolve(connector, environment, ("/etc/kv.yaml", text))
    assert resolved.chunk_size == 128
    assert resolved.gds_path == ["/a", "/b"]
    assert resolved.buffer_mib == 512
    assert resolved.save_decode_cache is True
    assert resolved.load_failure_policy == "fail"
    entries = resolved.as_dict()
    assert entries["chunk_size"] == {"value": 128, "origin": "KVRAIL_CHUNK_SIZE"}
    assert entries["gds_path"] == {"value": ["/a", "/b"], "origin": "kv_connector_extra_config"}
    assert entries["save_decode_cache"]["origin"] == "LMCACHE_SAVE_DECODE_CACHE"
    assert entries["max_size"] == {"value": 1000, "origin": "/etc/kv.yaml"}
    assert entries["min_free"] == {"value": 0.05, "origin": "default"}
    assert entries["extra_config.load_failure_policy"]["value"] == "fail"
    # A key without a value here is one that the binding does not know of.
    unset = {name for name, entry in entries.items() if entry["value"] is None}
    assert unset == {
        "extra_config.direct",
        "extra_config.local_cpu_shared",
        "extra_config.use_direct_io",
        "min_load_tokens",
        "ttl",
    }


def test_a_known_key_without_effect_is_one_warning() -> None:
    resolved = config("/kv", remote_url="redis://localhost:6379")
    assert len(resolved.warnings) == 1
    assert "remote_url" in resolved.warnings[0]


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match="gds_path") as raised:
        Store(config(path), namespace())
    assert str(path) in str(raised.value)


def test_a_read_only_store_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    memory = HostMemory(Geometry(), seed=1)
    with open_store(path, read_only=True) as store:
        report = memory.attach(store).store([(key(0), None, [0, 1, 2, 3])]).wait(60)
        assert (report.stored, report.dropped) == (0, 1)
        assert [mount["writable"] for mount in store.describe()] == [False]
    assert not path.exists()


def test_identity_and_model_decide_about_the_namespace() -> None:
    first = Namespace("org/model", '{"dtype": "bfloat16", "ranks": 2}')
    again = Namespace("org/model", '{"ranks": 2, "dtype": "bfloat16"}')
    other = Namespace("org/model", '{"ranks": 4, "dtype": "bfloat16"}')
    assert first.id == again.id != other.id
    assert len(first.id) == 16
    assert first.directory_name == f"org-model-{first.id}"
    for text in ("[]", "{", "1"):
        with pytest.raises(ConfigError, match="JSON object"):
            Namespace("org/model", text)


def test_wrong_arguments_are_refused_before_any_memory_is_touched(tmp_path: Path) -> None:
    memory = HostMemory(Geometry(), seed=1)
    before = memory.copy()
    layers, spans = memory.layers, memory.spans()
    with open_store(tmp_path) as store:

        def attach(layers: list[tuple[int, int, int, int]], spans: list[tuple[int, int]]) -> None:
            store.attach(layers, spans, memory, block_count=32, blocks_per_chunk=4)

        for wrong in (
            [(0, spans[0][1] - 4096, 4096, 4096)],
            [(1, 0, 4096, 4096)],
            [(0, 0, 4095, 4096)],
            [(0, 0, 2**62, 4096)],
            [(0, 0, 4096, 0)],
            [],
        ):
            with pytest.raises(ConfigError):
                attach(wrong, spans)
        for span in ((0, 4096), (spans[0][0], 0), (2**64 - 4096, 8192)):
            with pytest.raises(ConfigError):
                attach(layers, [span])
        with pytest.raises(OverflowError):
            attach([(0, -1, 4096, 4096)], spans)

        kv_cache = memory.attach(store)
        for blocks in ([0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 32], []):
            with pytest.raises(ConfigError):
                kv_cache.store([(key(0), None, blocks)])
            with pytest.raises(ConfigError):
                kv_cache.load([(key(0), None, 0, blocks)])
        for first_block in (1, 4, 2**63):
            with pytest.raises(ConfigError):
                kv_cache.load([(key(0), None, first_block, [0, 1, 2, 3])])
        for wrong_key in (b"", b"short", bytes(33)):
            with pytest.raises(ConfigError):
                store.lookup([wrong_key])
            with pytest.raises(ConfigError):
                kv_cache.store([(wrong_key, None, [0, 1, 2, 3])])
            with pytest.raises(ConfigError):
                kv_cache.load([(key(0), wrong_key, 0, [0, 1, 2, 3])])
        with pytest.raises(TypeError):
            store.lookup(["text"])  # type: ignore[list-item]
        assert store.metrics()["chunks_stored"] == 0
    assert all(np.array_equal(array, old) for array, old in zip(memory.arrays, before, strict=True))


def test_exceptions_have_the_bases_that_python_code_catches() -> None:
    bases = {
        "ConfigError": ValueError,
        "DamagedError": Exception,
        "StoreIoError": OSError,
        "NoSpaceError": core.StoreIoError,
        "WaitTimeoutError": TimeoutError,
        "ClosedError": Exception,
        "MismatchError": Exception,
    }
    for name, base in bases.items():
        exception = getattr(core, name)
        assert issubclass(exception, core.KvrailError) and issubclass(exception, base), name
        assert exception.__module__ == "kvrail._core"
        assert str(exception("the message")) == "the message"


def test_an_error_of_the_system_keeps_message_and_number(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(core.StoreIoError) as raised:
        Store(config(path / "store"), namespace())
    assert str(path) in str(raised.value)
    assert raised.value.errno == errno.ENAMETOOLONG
    assert os.strerror(errno.ENAMETOOLONG) in str(raised.value)


def test_a_link_that_leads_nowhere_names_the_setting(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(core.ConfigError, match="gds_path") as raised:
        Store(config(link / "store"), namespace())
    assert f"`{link}`: not a directory" in str(raised.value)


def test_the_module_says_what_it_is() -> None:
    assert core.__version__.count(".") == 2
    assert isinstance(core.debug_build, bool)
