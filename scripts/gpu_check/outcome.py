"""What comes of a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What came of a check: ``passed``, ``failed`` or ``skipped``, and why."""

    name: str
    outcome: str
    detail: str
    seconds: float = 0.0


class CheckError(Exception):
    """A check found something wrong; the message says what."""


class OtherWayError(Exception):
    """The store takes another way than the one to be checked; the message says why."""
