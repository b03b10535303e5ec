"""Shows how long a step has run: a line that counts on a terminal, lines now and then in a log."""

from __future__ import annotations

import sys
import time

QUIET_SECONDS = 10.0


class StepLine:
    """A named step; used as a context manager, and called whenever there is time to show it."""

    def __init__(self, name: str) -> None:
        """Names the step; its clock starts when it is entered."""
        self._name = name
        self._start = self._shown = 0.0

    def __enter__(self) -> StepLine:
        self._start = self._shown = time.monotonic()
        if not sys.stdout.isatty():
            print(f"  {self._name} ...", flush=True)
        return self

    def __call__(self) -> None:
        """Shows the seconds so far, often on a terminal and every ten seconds in a log."""
        now = time.monotonic()
        if sys.stdout.isatty():
            print(f"\r  {self._name} ... {now - self._start:.0f} s", end="", flush=True)
        elif now - self._shown >= QUIET_SECONDS:
            self._shown = now
            print(f"  {self._name} ... {now - self._start:.0f} s so far", flush=True)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        outcome = "done" if failure is None else "failed"
        overwrite = "\r" if sys.stdout.isatty() else ""
        elapsed = time.monotonic() - self._start
        print(f"{overwrite}  {self._name} ... {outcome}, {elapsed:.1f} s", flush=True)
