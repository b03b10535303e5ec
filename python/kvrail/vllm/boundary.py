"""Lookup for models whose KV cache groups do not all look back over all tokens.

A request can go on at a boundary where every group has what it needs: groups that see all tokens
all chunks before it, groups with a window only the last few. Asked for in this order:

1. how many leading chunks the groups have that need all of them; no boundary lies beyond,
2. at that boundary, whether each window is there: a few chunks,
3. only where one is not: which chunks the windows have at all, which gives the last boundary.

Nearly every prompt is answered by the first two, the first alone where nothing is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvrail._core import WaitTimeoutError
from kvrail.vllm.geometry import GroupGeometry
from kvrail.vllm.request_state import Ticket


class EachTicket(Protocol):
    """The part of ``PresenceTicket`` that is used here."""

    def poll(self) -> list[bool] | None: ...

    def wait(self, limit_seconds: float) -> list[bool]: ...


LookupPrefix = Callable[[Sequence[bytes], int], Ticket]
LookupEach = Callable[[Sequence[bytes], int], EachTicket]


class BoundaryTicket:
    """The number of leading chunks at whose end all groups can go on, once it is known."""

    def __init__(
        self,
        lookup_prefix: LookupPrefix,
        lookup_each: LookupEach,
        groups: Sequence[GroupGeometry],
        keys: Sequence[bytes],
    ) -> None:
        self._lookup_prefix = lookup_prefix
        self._lookup_each = lookup_each
        self._windows = [group for group in groups if group.is_windowed]
        self._keys = list(keys)
        self._boundary = len(self._keys)
        self._answer: int | None = None
        self._asked: list[tuple[GroupGeometry, Ticket]] = []
        self._listing: list[tuple[GroupGeometry, EachTicket]] = []
        whole = [group for group in groups if not group.is_windowed]
        self._go_on = self._look_through_windows
        if whole:
            self._go_on = self._take_whole
            self._asked = [(group, lookup_prefix(self._keys, group.index)) for group in whole]

    def poll(self) -> int | None:
        """The number of chunks, or None while it is not known."""
        while self._answer is None:
            if any(ticket.poll() is None for ticket in self._pending()):
                return None
            self._go_on()
        return self._answer

    def wait(self, limit_seconds: float) -> int:
        """The number of chunks. Raises ``WaitTimeoutError`` after ``limit_seconds``."""
        deadline = time.monotonic() + limit_seconds
        while (answer := self.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0.0:
                raise WaitTimeoutError(f"not done within {limit_seconds:.3f} s")
            # One may have been answered since; there is always something left to go on with.
            for ticket in self._pending():
                if ticket.poll() is None:
                    ticket.wait(left)
                    break
        return answer

    def _pending(self) -> list[Ticket | EachTicket]:
        return [
            *(ticket for _, ticket in self._asked),
            *(ticket for _, ticket in self._listing),
        ]

    # What is done when all that was asked for is answered.

    def _take_whole(self) -> None:
        for _, ticket in self._asked:
            found = ticket.poll()
            assert found is not None
            self._boundary = min(self._boundary, found)
        self._asked = []
        self._look_through_windows()

    def _look_through_windows(self) -> None:
        """Asks for the windows at the boundary, the last chunk first: it is the likeliest gone."""
        if self._boundary == 0 or not self._windows:
            self._answer = self._boundary
            return
        self._go_on = self._take_windows
        for group in self._windows:
            keys = self._needed(group)
            if keys:
                self._asked.append((group, self._lookup_prefix(keys, group.index)))

    def _take_windows(self) -> None:
        complete = all(ticket.poll() == len(self._needed(group)) for group, ticket in self._asked)
        self._asked = []
        if complete:
            self._answer = self._boundary
            return
        self._go_on = self._take_listing
        keys = self._keys[: self._boundary]
        self._listing = [(group, self._lookup_each(keys, group.index)) for group in self._windows]

    def _take_listing(self) -> None:
        present: dict[int, list[bool]] = {}
        for group, ticket in self._listing:
            found = ticket.poll()
            assert found is not None
            present[group.index] = found
        self._listing = []
        self._answer = last_boundary(self._boundary, self._windows, present)

    def _needed(self, group: GroupGeometry) -> list[bytes]:
        first = group.first_needed_chunk(self._boundary)
        return self._keys[first : self._boundary][::-1]


def last_boundary(
    limit: int, groups: Sequence[GroupGeometry], present: Mapping[int, Sequence[bool]]
) -> int:
    """The largest number of chunks, at most `limit`, at which each group has what it needs."""
    # How many chunks up to each one are there without a gap.
    runs: dict[int, list[int]] = {}
    for group in groups:
        run, counts = 0, [0]
        for is_there in present[group.index][:limit]:
            run = run + 1 if is_there else 0
            counts.append(run)
        runs[group.index] = counts
    for boundary in range(limit, 0, -1):
        if all(
            runs[group.index][boundary] >= boundary - group.first_needed_chunk(boundary)
            for group in groups
        ):
            return boundary
    return 0
