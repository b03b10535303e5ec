"""kvrail's connector with loads that a benchmark steers, round by round, in one engine.

vLLM loads it by `kv_connector_module_path`, in the process of the benchmark, which changes `steer`
between rounds. It is an experiment: what it does beside kvrail's own way is not in the package.

A chunk's file holds block after block, each with all its layers, so kvrail has no way to read one
layer of all blocks first. With `layer_files` every layer gets chunk files of its own, as a KV cache
group of one layer, through kvrail's public interface: the same store, the same threads, the same
verification, and the first layer's bytes come first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import kvrail._core as core

WAIT_LIMIT_SECONDS = 60.0
_real_store = core.Store


@dataclass
class Steer:
    """What loads do from now on."""

    layer_files: bool = False
    """Whether layers have files of their own beside the chunks'; set before the engine starts."""
    source: str = "chunks"
    """`chunks`, `layers` (their own files, in the order of the layers), or `nothing`."""
    wait: str = "step"
    """`step`: vLLM's asynchronous load. `layer`, `all`: the forward waits, at each layer for its
    bytes or at the first for all."""
    layer_names: list[str] = field(default_factory=list)
    under_way: list[Any] = field(default_factory=list)
    """Loads for which the forward waits."""
    submitted: float = 0.0
    settled: float = 0.0
    """When the last load was handed to the store, and when its end was seen."""


steer = Steer()


class SteeredStore:
    """A store whose attached memory is steered."""

    def __init__(self, config: Any, namespace: Any, **options: Any) -> None:
        self._store = _real_store(config, namespace, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def attach(
        self, layers: Sequence[Any], regions: Any, owner: Any, *, group: int = 0, **options: Any
    ) -> Any:
        """Attaches the memory as it is, and each of its layers as a group if wanted."""
        whole = self._store.attach(layers, regions, owner, group=group, **options)
        single = [
            self._store.attach([layer], regions, owner, group=group + 1 + index, **options)
            for index, layer in enumerate(layers if steer.layer_files else ())
        ]
        return SteeredKvCache(whole, single)


class SteeredKvCache:
    """Memory of one rank."""

    def __init__(self, whole: Any, single: list[Any]) -> None:
        self._whole = whole
        self._single = single

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def store(self, chunks: Any) -> Any:
        """Stores whole chunks; layers first if wanted, and waits for those lest any be dropped."""
        # All share one staging pool, which is too small for the layers of a step together.
        for cache in self._single:
            report = cache.store(chunks).wait(WAIT_LIMIT_SECONDS)
            if report.dropped or report.failed:
                raise RuntimeError(f"layers of {len(chunks)} chunks were not stored: {report}")
        return self._whole.store(chunks)

    def load(self, chunks: Any) -> Any:
        """Loads in the way that is steered."""
        steer.submitted = time.perf_counter()
        if steer.source == "nothing":
            return SteeredTicket([], len(chunks))
        caches = [self._whole] if steer.source == "chunks" else self._single
        ticket = SteeredTicket([cache.load(chunks) for cache in caches], len(chunks))
        if steer.wait != "step":
            steer.under_way.append(ticket)
        return ticket


class SteeredTicket:
    """The tickets of one load: one for all layers, or one for each, in their order."""

    def __init__(self, tickets: list[Any], chunks: int) -> None:
        self._tickets = tickets
        self._chunks = chunks

    def poll(self) -> Any:
        """The report, or None while anything is on its way."""
        reports = [ticket.poll() for ticket in self._tickets]
        return None if None in reports else self._report(reports)

    def wait(self, limit_seconds: float) -> Any:
        """The report, after a wait."""
        deadline = time.monotonic() + limit_seconds
        reports = [ticket.wait(max(0.0, deadline - time.monotonic())) for ticket in self._tickets]
        return self._report(reports)

    def wait_for_layer(self, layer: int) -> None:
        """Waits until the bytes of a layer are there."""
        ticket = self._tickets[layer if len(self._tickets) > 1 else 0]
        self._check(ticket.wait(WAIT_LIMIT_SECONDS))

    def _report(self, reports: list[Any]) -> Any:
        for report in reports:
            self._check(report)
        steer.settled = time.perf_counter()
        return SimpleNamespace(loaded=self._chunks, failed=[], errors=[])

    def _check(self, report: Any) -> None:
        # A load that fails would be computed, and the round would measure that.
        if report.failed:
            raise RuntimeError(f"chunks {report.failed} failed to load: {report.errors[0]}")


core.Store = SteeredStore  # type: ignore

from kvrail.vllm import KvrailConnector  # noqa: E402  (after the store was replaced)


class SteeredConnector(KvrailConnector):
    """`KvrailConnector` over the store above."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learns the order of the layers, which is that of `SteeredStore.attach`."""
        steer.layer_names = list(self._kv_cache_config.kv_cache_groups[0].layer_names)
        super().register_kv_caches(kv_caches)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Says that the load is part of the step, where it is."""
        tokens, _ = found = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found if steer.wait == "step" else (tokens, False)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Waits for the layer, or at the first for all."""
        for ticket in steer.under_way:
            if steer.wait == "layer":
                ticket.wait_for_layer(steer.layer_names.index(layer_name))
            elif layer_name == steer.layer_names[0]:
                ticket.wait(WAIT_LIMIT_SECONDS)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """To vLLM, only a load that it was told is asynchronous ever finishes."""
        sent, received = super().get_finished(finished_req_ids)
        if steer.under_way:
            steer.under_way.clear()
            received = None
        return sent, received
