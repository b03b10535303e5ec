"""Which vLLM this connector is for."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger(f"vllm.{__name__}")

SUPPORTED = (0, 32)

_warned = False


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is older than the connector can work with."""


def parse(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version such as ``0.32.0+cpu``, or None for ``dev``."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def check(version: str) -> None:
    """Raises ``UnsupportedVllmError`` for an older vLLM, warns once about a newer one."""
    global _warned
    found = parse(version)
    supported = ".".join(map(str, SUPPORTED))
    if found is not None and found < SUPPORTED:
        raise UnsupportedVllmError(
            f"kvrail needs vLLM {supported} or newer, but vLLM {version} is installed"
        )
    if found != SUPPORTED and not _warned:
        _warned = True
        logger.warning(
            "kvrail: vLLM %s is installed, this version of kvrail was checked with vLLM %s",
            version,
            supported,
        )
