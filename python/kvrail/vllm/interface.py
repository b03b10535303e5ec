"""The part of vLLM's connector interface that kvrail was written against.

``interface.json`` beside this file records it. ``changes`` compares it with an installed vLLM, so
that a test can say by name what a new version of vLLM changed.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("interface.json")


def describe(interface: type) -> dict[str, str]:
    """Public members of a connector class: methods with their parameters, properties, attributes.

    Annotations are left out: they are rewritten often and change no call.
    """
    members = {}
    for name in sorted(vars(interface)):
        if name.startswith("_") and name not in ("__init__", "_cache_hit_source"):
            continue
        members[name] = _describe_member(inspect.getattr_static(interface, name))
    return members


def _describe_member(member: Any) -> str:
    if isinstance(member, property):
        return "property"
    kind = "method"
    if isinstance(member, classmethod | staticmethod):
        kind = type(member).__name__
        member = member.__func__
    if not callable(member):
        return "attribute"
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(member).parameters.values()
    ]
    abstract = "abstract " if getattr(member, "__isabstractmethod__", False) else ""
    return f"{abstract}{kind}{inspect.Signature(parameters)}"


def installed() -> dict[str, dict[str, str]]:
    """The interface of the installed vLLM, by class."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base, metrics
    from vllm.v1 import kv_cache_interface
    from vllm.v1.core.sched import output

    classes = (
        base.KVConnectorBase_V1,
        base.SupportsHMA,
        base.KVConnectorWorkerMetadata,
        metrics.KVConnectorStats,
        metrics.KVConnectorPromMetrics,
        # What the hooks are given, and what decides whether a model can be stored.
        output.NewRequestData,
        output.CachedRequestData,
        output.KVConnectorBlockState,
        kv_cache_interface.KVCacheGroupSpec,
        kv_cache_interface.FullAttentionSpec,
        kv_cache_interface.MLAAttentionSpec,
    )
    return {interface.__name__: describe(interface) for interface in classes}


def recorded() -> dict[str, dict[str, str]]:
    """The interface that kvrail was written against."""
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def changes(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """What differs between two interfaces, one line each."""
    lines = []
    for interface in sorted(before.keys() | after.keys()):
        old, new = before.get(interface, {}), after.get(interface, {})
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                lines.append(f"{interface}.{name} is gone (was {old[name]})")
            elif name not in old:
                lines.append(f"{interface}.{name} is new: {new[name]}")
            elif old[name] != new[name]:
                lines.append(f"{interface}.{name} changed from {old[name]} to {new[name]}")
    return lines
