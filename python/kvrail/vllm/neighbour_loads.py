"""Blocks that another connector fills during the forward of a step, and may fail to.

Beside kvrail under vLLM's `MultiConnector` a connector can load inside a step. Which of its blocks
it could not load vLLM learns with the step's output, and computes them again; until then whatever
was computed after them may be wrong, in each request that has such a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from kvrail.vllm.geometry import NULL_BLOCK, GroupGeometry

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class NeighbourLoads:
    """The blocks in doubt, by the steps under way that fill them."""

    def __init__(self, groups: Sequence[GroupGeometry]) -> None:
        self._groups = groups
        self._begun = 0
        self._ended = 0
        self._steps: deque[tuple[int, frozenset[int]]] = deque()

    def step_began(self, output: SchedulerOutput, vllms_own_tokens: Callable[[str], int]) -> None:
        """Notes what a step loads.

        Of a request that the step takes up, ``vllms_own_tokens`` were in vLLM's cache; what it
        begins with beyond them was loaded, in this step or before.
        """
        self._begun += 1
        state = output.kv_connector_block_state
        if not output.has_sync_kv_loads or state is None:
            return
        blocks: set[int] = set()
        for req_id, computed in _taken_up(output):
            own = vllms_own_tokens(req_id)
            if own < computed:
                tables = state.resolve_block_ids(req_id)
                for group in self._groups:
                    first, end = own // group.block_tokens, -(-computed // group.block_tokens)
                    blocks.update(tables[group.index][first:end])
        blocks.discard(NULL_BLOCK)
        if blocks:
            self._steps.append((self._begun, frozenset(blocks)))

    def step_ended(self) -> None:
        """The oldest step under way is done, and vLLM knows which of its loads failed."""
        self._ended = min(self._ended + 1, self._begun)
        while self._steps and self._steps[0][0] <= self._ended:
            self._steps.popleft()

    def are_in_doubt(self, tables: Iterable[Collection[int]]) -> bool:
        """Whether any of a request's block tables has a block in doubt."""
        return bool(self._steps) and any(
            not blocks.isdisjoint(table) for table in tables for _, blocks in self._steps
        )


def _taken_up(output: SchedulerOutput) -> Iterable[tuple[str, int]]:
    """Requests that are new or resumed, with the tokens that they begin with."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        if req_id in cached.resumed_req_ids:
            yield req_id, computed
