"""Chunks that failed to load a short while ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

# A chunk that failed to load is taken for absent this long, so that requests with the same prompt
# do not fail on it one after the other while its file is being replaced.
BAD_KEY_SECONDS = 60.0
MAX_BAD_KEYS = 65536


class BadKeys:
    """Keys that are taken for absent, the oldest first; all are kept for the same time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._forget_at: OrderedDict[bytes, float] = OrderedDict()

    def add(self, keys: Iterable[bytes]) -> None:
        """Notes keys that failed now; beyond ``MAX_BAD_KEYS`` the oldest are forgotten."""
        forget_at = self._clock() + BAD_KEY_SECONDS
        for key in keys:
            self._forget_at.pop(key, None)
            self._forget_at[key] = forget_at
        while len(self._forget_at) > MAX_BAD_KEYS:
            self._forget_at.popitem(last=False)

    def __bool__(self) -> bool:
        """Whether any key is taken for absent now."""
        now = self._clock()
        while self._forget_at and next(iter(self._forget_at.values())) <= now:
            self._forget_at.popitem(last=False)
        return bool(self._forget_at)

    def good_prefix(self, keys: Sequence[bytes]) -> int:
        """How many leading keys come before the first one that is taken for absent."""
        if not self:
            return len(keys)
        bad = (index for index, key in enumerate(keys) if key in self._forget_at)
        return next(bad, len(keys))
