"""Lookups of requests: which leading chunks are there, asked early and again when it is worth it.

Nothing here waits for I/O, except for at most one millisecond in steps that compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvrail._core import KvrailError, WaitTimeoutError
from kvrail.vllm.bad_keys import BadKeys
from kvrail.vllm.geometry import ChunkGeometry
from kvrail.vllm.request_state import RequestState, Ticket
from kvrail.vllm.tally import Tally

# A request can wait in vLLM's queue for long; what was absent at its arrival may have come since.
ANSWER_SECONDS = 5.0
# Requests are looked up at their arrival, but a burst of them must not delay the next one in turn.
MAX_EARLY_LOOKUPS = 64
# A step without work for the model would be repeated at once; waiting here spares the spinning.
IDLE_WAIT_SECONDS = 0.001

Lookup = Callable[[Sequence[bytes]], Ticket]


class RequestLookups:
    """The lookups under way, and what is made of their answers."""

    def __init__(
        self,
        geometry: ChunkGeometry,
        wait_limit_seconds: float,
        tally: Tally,
        clock: Callable[[], float],
    ) -> None:
        self._geometry = geometry
        self._wait_limit_seconds = wait_limit_seconds
        self._tally = tally
        self._clock = clock
        self._bad_keys = BadKeys(clock)
        self._lookup: Lookup | None = None
        self._on_missing: Callable[[RequestState, int], None] | None = None
        # Keeps a step with nothing to do from walking over all requests.
        self._waiting: dict[str, RequestState] = {}

    def enable(
        self, lookup: Lookup, on_missing: Callable[[RequestState, int], None] | None = None
    ) -> None:
        """Starts looking up; `on_missing` is told the first chunk that is not there, by index."""
        self._lookup = lookup
        self._on_missing = on_missing

    def disable(self) -> None:
        """Ends all lookups."""
        self._lookup = None
        self._waiting.clear()

    @property
    def enabled(self) -> bool:
        """Whether anything is looked up."""
        return self._lookup is not None

    def has_room(self) -> bool:
        """Whether one more request may be looked up before its turn."""
        return len(self._waiting) < MAX_EARLY_LOOKUPS

    def submit(self, state: RequestState) -> None:
        """Asks for a request's chunks."""
        assert self._lookup is not None
        # One chunk more than may be loaded where the prompt ends with one: if it is there, it need
        # not be stored again.
        request = state.request
        count = min(
            request.num_tokens // self._geometry.chunk_size,
            len(request.block_hashes) // self._geometry.hashes_per_chunk,
        )
        state.hit_chunks = None
        state.submitted_at = self._clock()
        try:
            state.ticket = self._lookup(state.chunk_keys(self._geometry, count))
        except KvrailError as error:
            self._fail(state, error)
            return
        self._waiting[state.request.request_id] = state

    def answer(self, state: RequestState) -> int | None:
        """Leading chunks that can be loaded, or None while that is not known."""
        if state.hit_chunks is not None and self._clock() - state.answered_at > ANSWER_SECONDS:
            state.hit_chunks = None
        if state.hit_chunks is None and state.ticket is None:
            self.submit(state)
        self.poll(state)
        if state.hit_chunks is None:
            return None
        limit = state.loadable_chunks(self._geometry)
        return self._good_prefix(state, min(state.hit_chunks, limit))

    def poll(self, state: RequestState) -> None:
        """Takes the answer, if it is there; one that takes too long is a miss."""
        ticket = state.ticket
        if ticket is None:
            return
        try:
            found = ticket.poll()
        except KvrailError as error:
            self._fail(state, error)
            return
        if found is not None:
            self._settle(state, found)
        elif self._clock() - state.submitted_at > self._wait_limit_seconds:
            self._tally.count("lookup_timeouts", 1)
            self._tally.report("lookup", "no answer within the wait limit, taken for a miss")
            self._settle(state, 0)

    def wait_for_one(self) -> None:
        """In a step without work for the model: waits a moment for one answer, if any is due."""
        state = next(iter(self._waiting.values()), None)
        if state is None or state.ticket is None:
            return
        try:
            self._settle(state, state.ticket.wait(IDLE_WAIT_SECONDS))
        except WaitTimeoutError:
            return
        except KvrailError as error:
            self._fail(state, error)

    def failed_to_load(self, keys: Sequence[bytes]) -> None:
        """Keeps chunks from being promised again for a while."""
        self._bad_keys.add(keys)

    def forget(self, request_id: str) -> None:
        """Forgets a request."""
        self._waiting.pop(request_id, None)

    def forget_all(self) -> None:
        """Forgets all requests; what is under way for them answers nobody."""
        self._waiting.clear()

    def _settle(self, state: RequestState, found: int) -> None:
        state.ticket = None
        state.hit_chunks = found
        if self._on_missing is not None and found < len(state.keys):
            self._on_missing(state, found)
        state.answered_at = self._clock()
        if not state.load_failed:
            state.stored_chunks = max(state.stored_chunks, self._good_prefix(state, found))
        self._waiting.pop(state.request.request_id, None)

    def _fail(self, state: RequestState, error: KvrailError) -> None:
        self._tally.report(f"lookup {type(error).__name__}", error)
        self._tally.count("lookup_errors", 1)
        self._settle(state, 0)

    def _good_prefix(self, state: RequestState, count: int) -> int:
        """`count`, cut at the first chunk that failed to load a short while ago."""
        if not self._bad_keys:
            return count
        return self._bad_keys.good_prefix(state.chunk_keys(self._geometry, count))
