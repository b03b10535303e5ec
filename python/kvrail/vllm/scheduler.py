"""The scheduler side of the connector: what to look up, to load and to store.

It sees keys and block ids, never memory. No failure of the store leaves a hook as an exception,
because to vLLM a cache that fails is a cache that misses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrail.vllm.chunk_plan import load_chunks, store_chunks, store_states
from kvrail.vllm.events import StorageEvents
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.lmcache_files import request_problem
from kvrail.vllm.lmcache_hash import LmcacheHasher
from kvrail.vllm.load_or_compute import LoadOrCompute, prompt_tokens
from kvrail.vllm.metadata import (
    NO_WORK,
    NO_WORK_MAY_WAIT,
    GroupLoad,
    GroupStore,
    KvrailMetadata,
    KvrailWorkerMetadata,
    RequestLoad,
    StoreChunk,
)
from kvrail.vllm.neighbour_loads import NeighbourLoads
from kvrail.vllm.request_lookups import Lookup, RequestLookups
from kvrail.vllm.request_state import RequestState
from kvrail.vllm.tally import Tally
from kvrail.vllm.weights_watch import WeightsWatch

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

# What a request carries in its kv_transfer_params to get its chunk keys back, for `kvrail explain`.
EXPLAIN = "kvrail_explain"
# Keys in such an answer: 64 bytes each, at the end of a response.
MAX_EXPLAINED_CHUNKS = 1024


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """What the role and the configuration allow."""

    may_load: bool = True
    may_store: bool = True
    save_decode_cache: bool = False
    wait_limit_seconds: float = 30.0
    min_load_tokens: int | None = None
    """Least tokens of a hit that is loaded; None measures whether loading is worth it."""
    max_step_tokens: int | None = None
    """Tokens that vLLM computes in one step at most."""
    waits_when_idle: bool = True
    """Whether steps without work for the model may wait a moment, for a load or a lookup."""
    items_are_named: bool = True
    """Whether the block hashes name images and the like by their content."""


class ConnectorScheduler:
    """State of all requests; each public method is one hook of vLLM's scheduler."""

    def __init__(
        self,
        geometry: ChunkGeometry,
        options: SchedulerOptions,
        weights: WeightsWatch,
        *,
        adapter_fingerprint: Callable[[Any], bytes | None] = lambda lora_request: None,
        hasher: LmcacheHasher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._geometry = geometry
        self._options = options
        self._weights = weights
        self._adapter_fingerprint = adapter_fingerprint
        self._hasher = hasher
        self._tally = Tally()
        self._lookups = RequestLookups(geometry, options.wait_limit_seconds, self._tally, clock)
        self._load_or_compute = LoadOrCompute(
            options.min_load_tokens,
            min_step_tokens=geometry.chunk_size,
            max_step_tokens=options.max_step_tokens,
            clock=clock,
        )
        self._neighbour_loads = NeighbourLoads(geometry.groups)
        self._late_check: Callable[[], str | None] | None = None
        self._states: dict[str, RequestState] = {}
        # Keeps a step with nothing to do from walking over all requests.
        self._storing: set[str] = set()
        self._loads: list[RequestLoad] = []
        self._events: StorageEvents | None = None

    # Life of the connector.

    def enable(
        self,
        lookup: Lookup,
        late_check: Callable[[], str | None] | None = None,
        events: StorageEvents | None = None,
    ) -> None:
        """Starts looking up and storing.

        `late_check` is called once, with the first request, and returns a reason to stop or None.
        `events` is told what became of chunks.
        """
        self._lookups.enable(lookup, None if events is None else self._tell_missing)
        self._late_check = late_check
        self._events = events

    def disable(self) -> None:
        """Ends all lookups, loads and stores that were not handed to the worker yet."""
        self._lookups.disable()
        self._storing.clear()

    @property
    def geometry(self) -> ChunkGeometry:
        """How tokens, blocks and chunks relate."""
        return self._geometry

    @property
    def enabled(self) -> bool:
        """Whether anything is looked up or stored."""
        return self._lookups.enabled

    def take_counters(self) -> dict[str, float]:
        """What was counted since the last call, with the gauges when there is anything."""
        counters = self._tally.take()
        return counters | self._load_or_compute.gauges() if counters else counters

    # Hooks, in the order of a request's life.

    def on_new_request(self, request: Request) -> None:
        """Looks the request up early, so that the answer is there when vLLM asks."""
        self._notice_resets()
        state = self._state_of(request)
        if state is None or not self._lookups.has_room() or not self._may_load(state):
            return
        if state.loadable_chunks(self._geometry) > 0:
            self._lookups.submit(state)

    def get_num_new_matched_tokens(
        self, request: Request, local_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond `local_tokens` that can be loaded; None while the lookup is under way."""
        self._notice_resets()
        state = self._state_of(request)
        if state is None:
            return 0, False
        state.promised_tokens = 0
        state.local_tokens = local_tokens
        if not self._may_load(state, wait=True):
            return 0, False
        limit = state.loadable_chunks(self._geometry)
        if local_tokens >= limit * self._geometry.chunk_size:
            return 0, False
        if not self._weights.is_known:
            return None, False
        hit_chunks = self._lookups.answer(state)
        if hit_chunks is None:
            return None, False
        hit_tokens = hit_chunks * self._geometry.chunk_size
        if hit_tokens <= local_tokens or not self._is_worth_loading(
            state, hit_tokens - local_tokens
        ):
            return 0, False
        state.promised_tokens = hit_tokens
        return hit_tokens - local_tokens, True

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Turns the promise of the last lookup into a load, once vLLM has blocks for it."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        self._count_tokens(state, num_external_tokens)
        verdict, state.verdict = state.verdict, None
        # vLLM calls again when it allocates more after the load; the promise is spent by then.
        end, state.promised_tokens = state.promised_tokens, 0
        if num_external_tokens <= 0 or end == 0:
            return
        start = end - num_external_tokens
        tables = blocks.get_block_ids()
        keys = state.chunk_keys(self._geometry, end // self._geometry.chunk_size)
        # Files with LMCache's hashes may be copies of its own, which name no chunk before theirs.
        with_parents = self._hasher is None
        parts = (
            GroupLoad(
                place,
                load_chunks(
                    keys, start, end, group, tables[group.index], with_parents=with_parents
                ),
            )
            for place, group in enumerate(self._geometry.groups)
        )
        self._loads.append(RequestLoad(request.request_id, tuple(p for p in parts if p.chunks)))
        is_trial = verdict is not None and verdict.is_trial
        self._load_or_compute.load_began(request.request_id, num_external_tokens, is_trial=is_trial)
        state.stored_chunks = max(state.stored_chunks, end // self._geometry.chunk_size)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvrailMetadata:
        """The worker's part of this step."""
        self._notice_resets()
        is_idle = scheduler_output.total_num_scheduled_tokens == 0
        may_wait = is_idle and self._options.waits_when_idle
        if may_wait:
            self._lookups.wait_for_one()
        self._neighbour_loads.step_began(scheduler_output, self._vllms_own_tokens)
        stores: tuple[GroupStore, ...] = ()
        if self._storing and not is_idle and self._weights.is_known:
            stores = self._plan_stores(scheduler_output)
        self._note_step(scheduler_output)
        question = self._weights.take_question(computes=not is_idle) if self.enabled else None
        if not self._loads and not stores and question is None:
            return NO_WORK_MAY_WAIT if may_wait else NO_WORK
        loads, self._loads = tuple(self._loads), []
        return KvrailMetadata(loads, stores, may_wait, question)

    def update_connector_output(
        self, worker_metadata: object, finished_loads: Collection[str] = ()
    ) -> None:
        """Learns which loads ended, and which of them failed."""
        if worker_metadata is None and not finished_loads:
            return
        failures: Mapping[str, tuple[bytes, ...]] = {}
        if isinstance(worker_metadata, KvrailWorkerMetadata):
            failures = worker_metadata.failures
            if worker_metadata.weights and self._weights.take_answers(worker_metadata.weights):
                self._name_weights()
            if self._events is not None:
                self._events.stored(worker_metadata.stored)
        for request_id in finished_loads:
            self._load_or_compute.load_ended(request_id, failed=request_id in failures)
        for request_id, keys in failures.items():
            self._lookups.failed_to_load(keys)
            state = self._states.get(request_id)
            if state is None or state.is_left_alone:
                continue
            # vLLM computes the failed blocks again. Asking this request's luck a second time could
            # fail as well, for ever.
            state.load_failed = True
            failed = [state.keys.index(key) for key in keys if key in state.keys]
            if self._events is not None:
                for index in failed:
                    self._events.lost(state.request, index, state.keys[index])
            state.stored_chunks = min([state.stored_chunks, *failed])
            if self._options.may_store and self.enabled:
                self._storing.add(request_id)

    def step_ended(self) -> None:
        """Learns that the oldest step under way is done, after all else that it brought."""
        self._load_or_compute.step_ended()
        self._neighbour_loads.step_ended()

    def explanation(self, request: Request) -> dict[str, Any] | None:
        """What `kvrail explain` needs to know of a request, for one that asks for it."""
        params = getattr(request, "kv_transfer_params", None) or {}
        if not params.get(EXPLAIN):
            return None
        state = self._states.get(request.request_id)
        if state is None or state.explained_chunks is None or not self._weights.is_known:
            return {"kvrail": {"looked_up": False}}
        count = min(state.loadable_chunks(self._geometry), MAX_EXPLAINED_CHUNKS)
        keys = state.chunk_keys(self._geometry, count)
        return {
            "kvrail": {
                "looked_up": True,
                "chunk_size": self._geometry.chunk_size,
                "found_chunks": state.explained_chunks,
                "tokens_in_vllms_cache": state.local_tokens,
                "chunk_keys": [key.hex() for key in keys],
            }
        }

    def request_finished(self, request_id: str) -> None:
        """Forgets a request that ended or was aborted; a load under way is the worker's to end."""
        self._states.pop(request_id, None)
        self._lookups.forget(request_id)
        self._storing.discard(request_id)
        self._load_or_compute.forget(request_id)

    # Weights.

    def weights_may_have_changed(self) -> None:
        """Makes no more keys until the workers have said which weights they have.

        vLLM has preempted the requests that were running, and computes them again from their start.
        One that it goes on with has KV cache of two kinds of weights, perhaps: that one is left
        alone.
        """
        self._weights.doubt()
        self._lookups.forget_all()
        for request_id, state in self._states.items():
            if state.request.num_computed_tokens > 0:
                state.is_left_alone = True
                self._storing.discard(request_id)
            elif self.enabled and self._has_to_store(state.request):
                self._storing.add(request_id)
            state.start_over()

    def _notice_resets(self) -> None:
        if self._weights.saw_reset():
            self.weights_may_have_changed()

    def _name_weights(self) -> None:
        for state in self._states.values():
            state.salt = self._weights.salt

    # Requests.

    def _state_of(self, request: Request) -> RequestState | None:
        """The request's state, made on first sight; None when kvrail leaves the request alone."""
        state = self._states.get(request.request_id)
        if state is not None or not self.enabled:
            return state
        if self._late_check is not None:
            reason, self._late_check = self._late_check(), None
            if reason is not None:
                logger.error("kvrail: nothing is stored or loaded: %s", reason)
                self.disable()
                return None
        # A session that is continued rewrites its own tokens, and with them its hashes.
        if getattr(request, "resumable", False):
            return None
        if request.mm_features and not self._options.items_are_named:
            self._tally.report(
                "images without names",
                "with vLLM's prefix cache and its processor cache off, block hashes do not tell "
                "images apart: requests with images are not stored or loaded",
            )
            return None
        problem = request_problem(request) if self._hasher is not None else None
        if problem is not None:
            self._tally.report(
                f"request with {problem}",
                f"LMCache's hashes are made of tokens alone: requests with {problem} are not "
                "stored or loaded",
            )
            return None
        adapter = None
        if request.lora_request is not None:
            adapter = self._adapter_fingerprint(request.lora_request)
            if adapter is None:
                self._tally.report(
                    f"adapter {request.lora_request.lora_name}",
                    "its weights cannot be identified, so its requests are not stored or loaded",
                )
                return None
        state = RequestState(request, adapter, self._hasher, self._weights.salt)
        self._states[request.request_id] = state
        if self._has_to_store(request):
            self._storing.add(request.request_id)
        return state

    def _vllms_own_tokens(self, req_id: str) -> int:
        """Tokens that vLLM had itself when it last asked; 0 of a request that is left alone."""
        state = self._states.get(req_id)
        return 0 if state is None else state.local_tokens

    def _has_to_store(self, request: Request) -> bool:
        return self._options.may_store and (
            self._options.save_decode_cache
            or request.num_prompt_tokens >= self._geometry.chunk_size
        )

    def _tell_missing(self, state: RequestState, index: int) -> None:
        if self._events is not None:
            self._events.lost(state.request, index, state.keys[index])

    def _may_load(self, state: RequestState, *, wait: bool = False) -> bool:
        """With ``wait``, also when it is soon known which weights its keys are to stand for."""
        return (
            self.enabled
            and self._options.may_load
            and (self._weights.is_known or (wait and self._weights.may_wait))
            and not state.is_left_alone
            and not state.load_failed
            and not state.request.skip_reading_prefix_cache
        )

    # Loads and stores.

    def _is_worth_loading(self, state: RequestState, tokens: int) -> bool:
        """Decides once for a request that vLLM has no room for yet and asks about again."""
        if state.verdict is not None:
            return state.verdict.load
        verdict = state.verdict = self._load_or_compute.decide(tokens)
        if not verdict.load:
            self._tally.count("loads_declined", 1)
            self._tally.count("declined_tokens", tokens)
            if verdict.compute_seconds and self._tally.is_first("declined"):
                logger.info(
                    "kvrail: a hit of %d tokens is computed: loading is expected to take %.3f s, "
                    "computing %.3f s; min_load_tokens: 0 loads every hit",
                    tokens,
                    verdict.load_seconds,
                    verdict.compute_seconds,
                )
        return verdict.load

    def _note_step(self, output: SchedulerOutput) -> None:
        tokens = output.total_num_scheduled_tokens
        worth_a_look = tokens >= self._geometry.chunk_size
        self._load_or_compute.step_began(prompt_tokens(output) if worth_a_look else 0, tokens)

    def _plan_stores(self, output: SchedulerOutput) -> tuple[GroupStore, ...]:
        stores: tuple[list[StoreChunk], ...] = tuple([] for _ in self._geometry.groups)
        for new in output.scheduled_new_reqs:
            if new.req_id in self._storing:
                self._plan_request(new.req_id, new.num_computed_tokens, output, stores)
        cached = output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in self._storing:
                self._plan_request(req_id, computed, output, stores)
        parts = enumerate(stores)
        return tuple(GroupStore(place, tuple(chunks)) for place, chunks in parts if chunks)

    def _plan_request(
        self,
        req_id: str,
        computed: int,
        output: SchedulerOutput,
        stores: tuple[list[StoreChunk], ...],
    ) -> None:
        """Stores the chunks that are complete when this step's forward is done."""
        state = self._states[req_id]
        self._lookups.poll(state)
        geometry, request = self._geometry, state.request
        limit = len(request.block_hashes) * geometry.hash_tokens
        if not self._options.save_decode_cache:
            limit = min(limit, request.num_prompt_tokens)
        # Tokens with a hash are final, so drafts that may yet be rejected lie beyond the limit.
        tokens = min(computed + output.num_scheduled_tokens[req_id], limit)
        first, end = state.stored_chunks, tokens // geometry.chunk_size
        if first < end:
            block_state = output.kv_connector_block_state
            assert block_state is not None
            # Never remembered: a request that was preempted has other blocks now.
            tables = block_state.resolve_block_ids(req_id)
            if self._neighbour_loads.are_in_doubt(tables):
                return
            keys = state.chunk_keys(geometry, end)
            offered = block_state.boundary_state_offloads.get(req_id, ())
            for place, group in enumerate(geometry.groups):
                if group.holds_state:
                    states = {end: block for index, block, end in offered if index == group.index}
                    chunks = store_states(keys, first, group, states)
                else:
                    chunks = store_chunks(
                        keys, first, group, tables[group.index], with_parents=self._hasher is None
                    )
                for index, chunk in chunks:
                    stores[place].append(chunk)
                    if self._events is not None:
                        self._events.plan(request, place, index, chunk.key)
            state.stored_chunks = end
        if (
            not self._options.save_decode_cache
            and state.stored_chunks >= request.num_prompt_tokens // geometry.chunk_size
        ):
            self._storing.discard(req_id)

    # Counting and reporting.

    def _count_tokens(self, state: RequestState, hit_tokens: int) -> None:
        if state.counted or state.hit_chunks is None:
            return
        state.counted = True
        chunks = state.loadable_chunks(self._geometry)
        self._explain(state, chunks)
        possible = chunks * self._geometry.chunk_size
        self._tally.count("requests_looked_up", 1)
        self._tally.count("hit_tokens", hit_tokens)
        self._tally.count("miss_tokens", max(0, possible - state.local_tokens - hit_tokens))

    def _explain(self, state: RequestState, chunks: int) -> None:
        """Notes how much was found; where debugging is on, logs the first chunk that was not."""
        found = min(state.hit_chunks or 0, chunks)
        state.explained_chunks = found
        if found < chunks and logger.isEnabledFor(logging.DEBUG):
            keys = state.chunk_keys(self._geometry, found + 1)
            if len(keys) > found:
                logger.debug(
                    "kvrail: request %s: %d of %d chunks found, the first that is missing is %s",
                    state.request.request_id,
                    found,
                    chunks,
                    keys[found].hex(),
                )
