"""Shared settings and fixtures of the unit tests."""

from __future__ import annotations

import os

import pytest

# vLLM reports its usage over the network unless told otherwise; the tests are for loopback only.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def clock():
    """A clock that a test moves."""
    # After the variable was set, since this loads vLLM.
    from fakes import Clock

    return Clock()
