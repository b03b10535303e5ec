"""What the scheduler side counts and logs."""

from __future__ import annotations

import logging

logger = logging.getLogger(f"vllm.{__name__}")

# Kinds of problems that are logged; the rest is in the counters.
MAX_KINDS = 100


class Tally:
    """Counters that are taken once a step, and the first problem of each kind for the log."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._reported: set[str] = set()

    def count(self, name: str, amount: float) -> None:
        """Adds to a counter; of nothing no counter is made."""
        if amount:
            self._counters[name] = self._counters.get(name, 0.0) + amount

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        # Asked for in every step, and nearly always in vain.
        if not self._counters:
            return {}
        counters, self._counters = self._counters, {}
        return counters

    def is_first(self, kind: str) -> bool:
        """Whether nothing of this kind was reported yet; it counts as reported from here on."""
        if kind in self._reported or len(self._reported) >= MAX_KINDS:
            return False
        self._reported.add(kind)
        return True

    def report(self, kind: str, problem: object) -> None:
        """Logs the first problem of each kind."""
        if self.is_first(kind):
            logger.warning("kvrail: %s: %s", kind, problem)
