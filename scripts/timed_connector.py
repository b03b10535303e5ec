"""kvrail's connector beside the idle one, with every hook of both timed, for `bench_step.py`.

vLLM loads it by `kv_connector_module_path`. What vLLM calls is called on both, one right after the
other, in the same step and with the same arguments; vLLM gets what kvrail's returned.

The second finds the caches of the processor as the first left them: over a step of 100 calls that
is 50 to 200 microseconds, more than is to be measured. So which comes first alternates from step to
step and among the calls of a hook in a step, and a function that does nothing is called before
both. What is special to a connector is in no cache either way.

What was recorded is written to the folder that `BENCH_STEP_RECORDS` names: when vLLM ends the
connector, and on the scheduler side, whose process vLLM may kill instead, whenever no request is
left.
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
from types import FunctionType
from typing import Any

from kvrail.vllm import KvrailConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from idle_connector import IdleConnector

RECORDS = "BENCH_STEP_RECORDS"
# The last hook of a step on either side. What comes after it belongs to the next step.
LAST_HOOKS = frozenset({"take_events", "clear_connector_metadata"})
FINISHED_HOOKS = frozenset({"request_finished", "request_finished_all_groups"})


class Recorder:
    """What the connectors of one side were called in each step, and how long that took."""

    def __init__(self, role: KVConnectorRole) -> None:
        self.role = role.name.lower()
        self._hooks: dict[str, list[int]] = {}
        self._facts: dict[str, Any] = {}
        self._steps: list[dict[str, Any]] = []
        self._metadata: dict[str, Any] = {}
        self._requests = 0

    def idle_first(self, hook: str) -> bool:
        """Whether the next call goes to the idle connector before it goes to kvrail's."""
        known = self._hooks.get(hook)
        return (len(self._steps) + (0 if known is None else known[0])) % 2 == 1

    def add(self, hook: str, idle_nanoseconds: int, kvrail_nanoseconds: int) -> None:
        """Counts one call."""
        known = self._hooks.get(hook)
        if known is None:
            self._hooks[hook] = [1, idle_nanoseconds, kvrail_nanoseconds]
        else:
            known[0] += 1
            known[1] += idle_nanoseconds
            known[2] += kvrail_nanoseconds
        if hook in LAST_HOOKS:
            self._end_step()
        elif hook == "on_new_request":
            self._requests += 1
        elif hook in FINISHED_HOOKS:
            self._requests -= 1
        elif hook == "shutdown":
            self.write()

    def note(self, hook: str, arguments: tuple[Any, ...], idle: Any, kvrail: Any) -> None:
        """Keeps what tells whether there was anything to do; its time does not count."""
        if hook == "build_connector_meta":
            output = arguments[0]
            self._metadata = {"idle": idle, "kvrail": kvrail}
            self._facts["requests"] = len(output.num_scheduled_tokens)
            self._facts["tokens"] = output.total_num_scheduled_tokens
            self._facts["loads"] = len(kvrail.loads)
            self._facts["stores"] = len(kvrail.stores)
        elif hook == "get_kv_connector_stats" and kvrail is not None and not kvrail.is_empty():
            self._facts["moved"] = sorted(kvrail.data)

    def _end_step(self) -> None:
        self._steps.append(
            {
                "ended": time.perf_counter_ns(),
                "hooks": self._hooks,
                **self._facts,
            }
        )
        self._hooks, self._facts = {}, {}
        if self.role == "scheduler" and self._requests == 0:
            self.write()

    def write(self) -> None:
        """Writes all steps."""
        target = Path(os.environ[RECORDS]) / f"{self.role}-{os.getpid()}.json"
        record = {
            "process": os.getpid(),
            "steps": self._steps,
            "hand_over_microseconds": {
                kind: _hand_over_microseconds(metadata) for kind, metadata in self._metadata.items()
            },
        }
        target.write_text(json.dumps(record))


def _hand_over_microseconds(metadata: Any) -> float:
    """What it takes to make a step's metadata bytes and back, as between processes."""
    took = timeit.repeat(lambda: pickle.loads(pickle.dumps(metadata)), number=1000)
    return min(took) * 1e3


class TimedKvrail(KvrailConnector):
    """kvrail's connector, with the idle one as its shadow.

    Both are objects of their own: what they call on themselves is part of the hook that vLLM
    called, and costs no timing.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self.recorder = Recorder(role)
        self.kvrail = KvrailConnector(vllm_config, role, kv_cache_config)
        self.idle = IdleConnector(vllm_config, role, kv_cache_config)

    def __getattr__(self, name: str) -> Any:
        """Properties, which are inherited, find the state of kvrail's connector."""
        return getattr(self.kvrail, name)


def _do_nothing(*arguments: Any, **options: Any) -> None:
    """Brings into the caches what it takes to call and to time any function."""


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own.

    Python fits code to the class that it meets first. What both connectors inherit would be quicker
    for one of them, and in the caches for the second, which it is not where there is only one.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _timed_hook(name: str) -> Callable[..., Any]:
    call_idle, call_kvrail = _copy(getattr(IdleConnector, name)), getattr(KvrailConnector, name)
    noted = name in ("build_connector_meta", "get_kv_connector_stats")
    clock = time.perf_counter_ns

    @wraps(call_kvrail)
    def hook(self: TimedKvrail, *arguments: Any, **options: Any) -> Any:
        recorder, idle, kvrail = self.recorder, self.idle, self.kvrail
        idle_first = recorder.idle_first(name)
        clock()
        _do_nothing(self, *arguments, **options)
        if idle_first:
            began = clock()
            ignored = call_idle(idle, *arguments, **options)
            between = clock()
            result = call_kvrail(kvrail, *arguments, **options)
            ended = clock()
            took = between - began, ended - between
        else:
            began = clock()
            result = call_kvrail(kvrail, *arguments, **options)
            between = clock()
            ignored = call_idle(idle, *arguments, **options)
            ended = clock()
            took = ended - between, between - began
        if noted:
            recorder.note(name, arguments, ignored, result)
        recorder.add(name, *took)
        return result

    return hook


# The public methods of the idle connector are those of vLLM's base class, which are all that vLLM
# calls. The idle one's do nothing but keep what they were given, so none has to be left out.
for _name, _ in inspect.getmembers(IdleConnector, inspect.isfunction):
    if not _name.startswith("_"):
        setattr(TimedKvrail, _name, _timed_hook(_name))
