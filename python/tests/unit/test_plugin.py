"""The plugin hook: who gets the name of LMCache's connector."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

import kvrail.vllm
from kvrail.vllm import KvrailConnector, plugin


@pytest.fixture
def registry(monkeypatch) -> dict:
    copy = dict(KVConnectorFactory._registry)
    for name in list(copy):
        if copy[name] is plugin.load_connector:
            del copy[name]
    copy.setdefault(plugin.LMCACHE_NAME, object())
    monkeypatch.setattr(KVConnectorFactory, "_registry", copy)
    monkeypatch.delenv(plugin.TAKEOVER_VARIABLE, raising=False)
    return copy


def install_lmcache(monkeypatch, installed: bool) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (
            (object() if installed else None) if name == "lmcache" else real(name, *rest)
        ),
    )


@pytest.mark.parametrize(
    ("installed", "setting", "taken"),
    [
        (False, None, True),
        (False, "0", False),
        (True, None, False),
        (True, "1", True),
        (True, "true", True),
        (True, "", False),
    ],
)
def test_takeover(registry, monkeypatch, installed, setting, taken):
    install_lmcache(monkeypatch, installed)
    if setting is not None:
        monkeypatch.setenv(plugin.TAKEOVER_VARIABLE, setting)
    before = registry[plugin.LMCACHE_NAME]
    for _ in range(2):
        plugin.register()
    assert registry[plugin.NAME]() is KvrailConnector
    expected = plugin.load_connector if taken else before
    assert registry[plugin.LMCACHE_NAME] is expected


@pytest.mark.parametrize("mentioned", [True, False])
def test_the_way_to_choose_is_said_only_to_who_may_mean_it(registry, monkeypatch, mentioned):
    install_lmcache(monkeypatch, True)
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    argument = '{"kv_connector":"LMCacheConnectorV1"}' if mentioned else "{}"
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "--kv-transfer-config", argument])
    lines = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *rest: lines.append(text % rest))
    plugin.register()
    assert len(lines) == mentioned
    assert all("KVRAIL_TAKEOVER=1" in line for line in lines)


def test_a_failure_does_not_end_the_start_of_vllm(monkeypatch):
    problems = []
    monkeypatch.delattr(KVConnectorFactory, "_registry")
    monkeypatch.setattr(plugin.logger, "warning", lambda *rest: problems.append(rest))
    plugin.register()
    assert len(problems) == 1


@pytest.fixture
def import_anew(monkeypatch):
    """Imports the connector as a process does that has not, and puts the modules back after."""

    def run():
        name = "kvrail.vllm.connector"
        monkeypatch.setattr(kvrail.vllm, "connector", sys.modules[name])
        monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(name).KvrailConnector

    return run


def test_a_connector_that_was_imported_is_known_by_its_name(registry, import_anew):
    """MultiConnector asks for it so in the API server, also when no plugin is loaded."""
    assert plugin.NAME not in registry
    connector = import_anew()
    stats = MultiConnector.build_kv_connector_stats({plugin.NAME: {"hit_tokens": 3}})
    assert stats.data[plugin.NAME].data == {"hit_tokens": 3}
    assert KVConnectorFactory.get_connector_class_by_name(plugin.NAME) is connector


def test_a_name_that_is_known_is_not_taken_over(registry, import_anew):
    registry[plugin.NAME] = other = object()
    import_anew()
    assert registry[plugin.NAME] is other


def test_a_factory_of_another_shape_does_not_end_the_import(monkeypatch, import_anew):
    problems = []
    monkeypatch.setattr(plugin.logger, "warning", lambda *rest: problems.append(rest))
    monkeypatch.delattr(KVConnectorFactory, "_registry")
    import_anew()
    monkeypatch.setattr(KVConnectorFactory, "_registry", [], raising=False)
    import_anew()
    assert len(problems) == 2
