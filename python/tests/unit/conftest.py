"""Shared settings of the unit tests."""

from __future__ import annotations

import os

# vLLM reports its usage over the network unless told otherwise; the tests are for loopback only.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
