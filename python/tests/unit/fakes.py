"""Stand-ins for the store, its tickets and vLLM's per-step objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import (
    CachedRequestData,
    KVConnectorBlockState,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.request import Request

from kvrail._core import KvrailError, WaitTimeoutError
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.scheduler import ConnectorScheduler, SchedulerOptions
from kvrail.vllm.weights_watch import WeightsWatch

BLOCK = 16
CHUNK = 64
PER_CHUNK = CHUNK // BLOCK
GEOMETRY = ChunkGeometry(CHUNK, BLOCK, BLOCK)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_request(
    request_id: str, tokens: int, *, first: int = 0, salt: str | None = None, lora: object = None
) -> Request:
    """A real request of vLLM with real block hashes."""
    kv_cache_utils.init_none_hash(sha256)
    return Request(
        request_id,
        [first + index for index in range(tokens)],
        SamplingParams(max_tokens=64),
        None,
        cache_salt=salt,
        lora_request=lora,
        block_hasher=kv_cache_utils.get_request_block_hasher(BLOCK, sha256),
    )


@dataclass
class FakeTicket:
    """A lookup that is answered when the test says so."""

    keys: list[bytes]
    answer: int | None = None
    error: KvrailError | None = None
    waits: list[float] = field(default_factory=list)

    def poll(self) -> int | None:
        if self.error is not None:
            raise self.error
        return self.answer

    def wait(self, limit_seconds: float) -> int:
        self.waits.append(limit_seconds)
        found = self.poll()
        if found is None:
            raise WaitTimeoutError("still looking")
        return found


class FakeLookup:
    """Answers from a set of keys at once, or later when `answering` is off."""

    def __init__(self, present: Sequence[bytes] = (), answering: bool = True) -> None:
        self.present = set(present)
        self.answering = answering
        self.tickets: list[FakeTicket] = []

    def __call__(self, keys: Sequence[bytes]) -> FakeTicket:
        ticket = FakeTicket(list(keys))
        self.tickets.append(ticket)
        if self.answering:
            self.settle(ticket)
        return ticket

    def settle(self, ticket: FakeTicket) -> None:
        missing = [index for index, key in enumerate(ticket.keys) if key not in self.present]
        ticket.answer = missing[0] if missing else len(ticket.keys)


class FakeBlocks:
    """The blocks that vLLM allocated to a request."""

    def __init__(self, block_ids: Sequence[int]) -> None:
        self._block_ids = list(block_ids)

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (self._block_ids,)


def step(
    *,
    new: Sequence[tuple[Request, int, int]] = (),
    cached: Sequence[tuple[Request, int, int]] = (),
    resumed: Sequence[str] = (),
    blocks: dict[str, Sequence[int]] | None = None,
) -> SchedulerOutput:
    """One step of vLLM's scheduler: (request, tokens computed before, tokens scheduled)."""
    tables = blocks or {}
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(
            req_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=[],
            sampling_params=None,
            pooling_params=None,
            block_ids=([],),
            num_computed_tokens=computed,
            lora_request=None,
        )
        for request, computed, _ in new
    ]
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=[request.request_id for request, _, _ in cached],
        resumed_req_ids=set(resumed),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None for _ in cached],
        num_computed_tokens=[computed for _, computed, _ in cached],
        num_output_tokens=[0 for _ in cached],
    )
    scheduled = {request.request_id: count for request, _, count in [*new, *cached]}
    output.num_scheduled_tokens = scheduled
    output.total_num_scheduled_tokens = sum(scheduled.values())
    output.kv_connector_block_state = KVConnectorBlockState(
        req_ids=set(scheduled),
        resolve_block_ids=lambda req_id: (list(tables[req_id]),),
        boundary_state_offloads={},
    )
    return output


@dataclass
class FakeLoadTicket:
    """A load that ends when the test gives it a report or an error."""

    report: SimpleNamespace | None = None
    error: KvrailError | None = None
    waits: list[float] = field(default_factory=list)

    def poll(self) -> SimpleNamespace | None:
        if self.error is not None:
            raise self.error
        return self.report

    def wait(self, limit_seconds: float) -> SimpleNamespace:
        self.waits.append(limit_seconds)
        found = self.poll()
        if found is None:
            raise WaitTimeoutError("still loading")
        return found


class FakeKvCache:
    """Records what is loaded and stored."""

    def __init__(self) -> None:
        self.tickets: list[FakeLoadTicket] = []
        self.loads: list[list] = []
        self.stores: list[list] = []
        self.streams: list[int] = []
        self.error: KvrailError | None = None

    def load(self, chunks: Sequence, *, stream: int = 0) -> FakeLoadTicket:
        if self.error is not None:
            raise self.error
        self.streams.append(stream)
        self.loads.append(list(chunks))
        self.tickets.append(FakeLoadTicket())
        return self.tickets[-1]

    def store(self, chunks: Sequence, *, stream: int = 0) -> None:
        if self.error is not None:
            raise self.error
        self.streams.append(stream)
        self.stores.append(list(chunks))


class FakeStore:
    """A store's totals and notices."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {"chunks_stored": 0.0}
        self.notices: list[tuple[str, str]] = []
        self.closed: list[float] = []

    def metrics(self) -> dict[str, float]:
        return dict(self.totals)

    def take_notices(self) -> list[tuple[str, str]]:
        notices, self.notices = self.notices, []
        return notices

    def close(self, limit_seconds: float) -> None:
        self.closed.append(limit_seconds)


def watch(clock: Callable[[], float] = time.monotonic, **options: object) -> WeightsWatch:
    """Of one worker unless ``options`` say otherwise."""
    return WeightsWatch(**{"workers": 1, "wait_limit_seconds": 30.0, "clock": clock} | options)


def make(
    lookup: FakeLookup | None,
    clock: Clock,
    *,
    weights: WeightsWatch | None = None,
    **options: object,
) -> ConnectorScheduler:
    made = ConnectorScheduler(
        GEOMETRY,
        SchedulerOptions(**options),
        weights or watch(clock),
        adapter_fingerprint=lambda lora: lora.fingerprint,
        clock=clock,
    )
    if lookup is not None:
        made.enable(lookup)
    return made


def keys_of(request, count: int) -> list[bytes]:
    return [bytes(request.block_hashes[(i + 1) * PER_CHUNK - 1]) for i in range(count)]
