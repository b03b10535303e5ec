"""The plugin hook: who gets the name of LMCache's connector."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

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
