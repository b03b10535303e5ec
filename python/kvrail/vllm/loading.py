"""The loads of one request under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrail._core import KvrailError, LoadReport, LoadTicket, WaitTimeoutError

if TYPE_CHECKING:
    from kvrail.vllm.metadata import RequestLoad

Reports = list[LoadReport | None]


class Loading:
    """A request's loads under way, one for each KV cache group that takes part."""

    def __init__(self, load: RequestLoad, tickets: list[LoadTicket | None]) -> None:
        self.load = load
        self.tickets = tickets
        """Those that were submitted and are not done."""
        self.reports: Reports = [None] * len(load.parts)

    @property
    def is_over(self) -> bool:
        """Whether nothing writes to the request's blocks any more."""
        return all(ticket is None for ticket in self.tickets)

    def poll(self, report_error: Callable[[str, object], None]) -> None:
        """Takes what is done; an error ends a load without a report."""
        for place, ticket in enumerate(self.tickets):
            if ticket is None:
                continue
            try:
                report = ticket.poll()
            except KvrailError as error:
                report_error("load", error)
                self.tickets[place] = None
                continue
            if report is not None:
                self._take(place, report)

    def wait(self, limit_seconds: float, report_error: Callable[[str, object], None]) -> None:
        """Waits a moment for the first that is not done.

        A load is never given up here: the store may still write to the blocks, and it ends every
        load within its own limit.
        """
        place, ticket = next((p, t) for p, t in enumerate(self.tickets) if t is not None)
        try:
            self._take(place, ticket.wait(limit_seconds))
        except WaitTimeoutError:
            return
        except KvrailError as error:
            report_error("load", error)
            self.tickets[place] = None

    def _take(self, place: int, report: LoadReport) -> None:
        self.tickets[place] = None
        self.reports[place] = report
