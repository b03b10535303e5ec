"""Which vLLM is taken, and what changed in the one that is installed."""

from __future__ import annotations

import pytest
import vllm

from kvrail.vllm import interface, version
from kvrail.vllm.version import UnsupportedVllmError


@pytest.mark.parametrize("old", ["0.31.2", "0.9.0+cpu", "0.4"])
def test_an_older_vllm_is_refused_with_both_versions(old):
    with pytest.raises(UnsupportedVllmError) as caught:
        version.check(old)
    assert old in str(caught.value)
    assert "0.32" in str(caught.value)


def test_a_newer_vllm_is_warned_about_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(version, "_warned", False)
    monkeypatch.setattr(version.logger, "warning", lambda *arguments: warnings.append(arguments))
    for found in ("0.32.0", "0.32.1+cpu"):
        version.check(found)
    assert warnings == []
    for found in ("0.33.0", "1.0", "dev"):
        version.check(found)
    assert len(warnings) == 1
    assert "0.33.0" in warnings[0]


def test_the_interface_of_the_installed_vllm_is_the_recorded_one():
    found = interface.changes(interface.recorded(), interface.installed())
    assert not found, f"vLLM {vllm.__version__} changed:\n" + "\n".join(found)


def test_changes_are_named():
    before = {"C": {"gone": "method(self)", "same": "property", "other": "method(self, a)"}}
    after = {"C": {"same": "property", "other": "method(self, a, b)", "new": "method(self)"}}
    assert interface.changes(before, after) == [
        "C.gone is gone (was method(self))",
        "C.new is new: method(self)",
        "C.other changed from method(self, a) to method(self, a, b)",
    ]
