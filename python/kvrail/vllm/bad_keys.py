"""Chunks that failed to load a short while ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# A chunk that failed to load is taken for absent for a while, so that requests with the same prompt
# do not fail on it one after the other while its file is being replaced. A mount that stumbled once
# is well again soon, so the first while is short; each failure that follows makes it longer.
FIRST_PAUSE_SECONDS = 2.0
PAUSE_FACTOR = 4.0
MAX_PAUSE_SECONDS = 60.0
MAX_BAD_KEYS = 65536


@dataclass(frozen=True, slots=True)
class _Pause:
    seconds: float
    until: float

    @property
    def forget_at(self) -> float:
        """From when on a failure counts as the first one again."""
        return self.until + MAX_PAUSE_SECONDS


class BadKeys:
    """Keys that are taken for absent, the one that failed last at the end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pauses: OrderedDict[bytes, _Pause] = OrderedDict()
        # The end of the longest pause, so that a step with no bad key looks at no key.
        self._all_over_at = float("-inf")

    def add(self, keys: Iterable[bytes]) -> None:
        """Notes keys that failed now; beyond ``MAX_BAD_KEYS`` the oldest are forgotten."""
        now = self._clock()
        for key in keys:
            seconds = self._next_pause(self._pauses.pop(key, None), now)
            pause = self._pauses[key] = _Pause(seconds, now + seconds)
            self._all_over_at = max(self._all_over_at, pause.until)
        while self._pauses and (
            len(self._pauses) > MAX_BAD_KEYS or next(iter(self._pauses.values())).forget_at <= now
        ):
            self._pauses.popitem(last=False)

    @staticmethod
    def _next_pause(last: _Pause | None, now: float) -> float:
        if last is None or last.forget_at <= now:
            return FIRST_PAUSE_SECONDS
        # Loads that were under way when the key failed first fail with it: one failure, not many.
        if now < last.until:
            return last.seconds
        return min(last.seconds * PAUSE_FACTOR, MAX_PAUSE_SECONDS)

    def __bool__(self) -> bool:
        """Whether any key is taken for absent now."""
        return self._clock() < self._all_over_at

    def good_prefix(self, keys: Sequence[bytes]) -> int:
        """How many leading keys come before the first one that is taken for absent."""
        if not self:
            return len(keys)
        now = self._clock()
        bad = (index for index, key in enumerate(keys) if self._is_bad(key, now))
        return next(bad, len(keys))

    def _is_bad(self, key: bytes, now: float) -> bool:
        pause = self._pauses.get(key)
        return pause is not None and now < pause.until
