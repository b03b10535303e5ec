"""kvrail's connector and the idle one, with every hook timed from outside, for `bench_step.py`.

vLLM loads them by `kv_connector_module_path`. Each public method that vLLM calls is wrapped; calls
that a connector makes to itself are inside the hook that vLLM called, and not counted again. What
was recorded is written to the folder that `BENCH_STEP_RECORDS` names: when vLLM ends the connector,
and on the scheduler side, whose process vLLM may kill instead, whenever no request is left.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import time
import timeit
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from kvrail.vllm import KvrailConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from idle_connector import IdleConnector

RECORDS = "BENCH_STEP_RECORDS"
# The last hook of a step on either side. What comes after it belongs to the next step.
LAST_HOOKS = frozenset({"take_events", "clear_connector_metadata"})
FINISHED_HOOKS = frozenset({"request_finished", "request_finished_all_groups"})


class Recorder:
    """What one connector was called in each step, and how long that took."""

    def __init__(self, role: KVConnectorRole) -> None:
        self.role = role.name.lower()
        self.inside = False
        self._hooks: dict[str, list[int]] = {}
        self._facts: dict[str, Any] = {}
        self._steps: list[dict[str, Any]] = []
        self._metadata: Any = None
        self._requests = 0

    def add(self, hook: str, nanoseconds: int) -> None:
        """Counts one call."""
        known = self._hooks.get(hook)
        if known is None:
            self._hooks[hook] = [1, nanoseconds]
        else:
            known[0] += 1
            known[1] += nanoseconds
        if hook in LAST_HOOKS:
            self._end_step()
        elif hook == "on_new_request":
            self._requests += 1
        elif hook in FINISHED_HOOKS:
            self._requests -= 1
        elif hook == "shutdown":
            self.write()

    def note(self, hook: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Keeps what tells whether there was anything to do; its time does not count."""
        if hook == "build_connector_meta":
            output = arguments[0]
            self._metadata = result
            self._facts["requests"] = len(output.num_scheduled_tokens)
            self._facts["tokens"] = output.total_num_scheduled_tokens
            self._facts["loads"] = len(getattr(result, "loads", ()))
            self._facts["stores"] = len(getattr(result, "stores", ()))
        elif hook == "get_kv_connector_stats" and result is not None and not result.is_empty():
            self._facts["moved"] = sorted(result.data)

    def _end_step(self) -> None:
        self._steps.append({"ended": time.perf_counter_ns(), "hooks": self._hooks, **self._facts})
        self._hooks, self._facts = {}, {}
        if self.role == "scheduler" and self._requests == 0:
            self.write()

    def write(self) -> None:
        """Writes all steps."""
        target = Path(os.environ[RECORDS]) / f"{self.role}-{os.getpid()}.json"
        record = {
            "process": os.getpid(),
            "steps": self._steps,
            "hand_over_microseconds": self._hand_over_microseconds(),
        }
        target.write_text(json.dumps(record))

    def _hand_over_microseconds(self) -> float:
        """What it takes to make a step's metadata bytes and back, as between processes."""
        if self._metadata is None:
            return 0.0
        took = timeit.repeat(lambda: pickle.loads(pickle.dumps(self._metadata)), number=1000)
        return min(took) * 1e3


def timed(connector: type) -> type:
    """Wraps all public methods of a connector class, the inherited ones too."""
    for name, function in inspect.getmembers(connector, inspect.isfunction):
        if not name.startswith("_"):
            setattr(connector, name, _timed_hook(name, function))
    return connector


def _timed_hook(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    noted = name in ("build_connector_meta", "get_kv_connector_stats")
    clock = time.perf_counter_ns

    @wraps(function)
    def hook(self: Any, *arguments: Any, **options: Any) -> Any:
        recorder = self.recorder
        if recorder.inside:
            return function(self, *arguments, **options)
        recorder.inside = True
        began = clock()
        try:
            result = function(self, *arguments, **options)
        finally:
            took = clock() - began
            recorder.inside = False
        if noted:
            recorder.note(name, arguments, result)
        recorder.add(name, took)
        return result

    return hook


@timed
class TimedKvrail(KvrailConnector):
    """kvrail's connector, timed."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self.recorder = Recorder(role)
        super().__init__(vllm_config, role, kv_cache_config)


@timed
class TimedIdle(IdleConnector):
    """The connector that does nothing, timed."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self.recorder = Recorder(role)
        super().__init__(vllm_config, role, kv_cache_config)
