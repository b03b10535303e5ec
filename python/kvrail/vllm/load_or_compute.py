"""Whether a hit is worth loading, or computing the same tokens is quicker.

Both are measured where vLLM runs, from what its scheduler sees: how long loads took, and how long
the steps took in which prompts were computed. A load that is expected to take longer than computing
is not made; one is still tried from time to time, or a mount that was slow for a while would be
left alone for ever.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# Weight that each sample leaves to the ones before it: the last twenty count for most.
FORGETTING = 0.95
# Below so many samples of either kind nothing is known, and hits are loaded.
MIN_SAMPLES = 4
# A step counts as one that computes prompts from this share of its tokens on.
PREFILL_SHARE = 0.5
# Loads that were expected to be slower than computing are tried again after twenty times what the
# last one took, so that trying costs at most a twentieth of the time, within these bounds.
TRIAL_PAUSE_FACTOR = 20.0
MIN_TRIAL_PAUSE_SECONDS = 10.0
MAX_TRIAL_PAUSE_SECONDS = 600.0
# vLLM has one or two steps under way, and as many as there are pipeline stages.
MAX_STEPS_UNDER_WAY = 1024


class CostLine:
    """Seconds as ``fixed + per_token * tokens``, by least squares over the latest samples.

    The weight of a sample falls by ``FORGETTING`` with each later one. Neither part is negative:
    where the data ask for that, the line goes through the origin, or is flat.
    """

    __slots__ = ("_count", "_weight", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all samples."""
        self._count = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Takes a sample; ``tokens`` is above 0."""
        x = float(tokens)
        self._count += 1
        self._weight = self._weight * FORGETTING + 1.0
        self._x = self._x * FORGETTING + x
        self._y = self._y * FORGETTING + seconds
        self._xx = self._xx * FORGETTING + x * x
        self._xy = self._xy * FORGETTING + x * seconds

    @property
    def is_known(self) -> bool:
        """Whether there are enough samples to go by."""
        return self._count >= MIN_SAMPLES

    @property
    def tokens_per_second(self) -> float:
        """The mean over the samples, the fixed part included; 0 without samples."""
        return self._x / self._y if self._y > 0.0 else 0.0

    def parts(self) -> tuple[float, float]:
        """``(fixed, per_token)`` in seconds."""
        if self._count == 0:
            return 0.0, 0.0
        spread = self._weight * self._xx - self._x * self._x
        # Sizes that differ by less than a percent say nothing about the slope.
        if spread <= 1e-4 * self._weight * self._xx:
            return 0.0, self._xy / self._xx
        per_token = (self._weight * self._xy - self._x * self._y) / spread
        fixed = (self._y - per_token * self._x) / self._weight
        if per_token < 0.0:
            return self._y / self._weight, 0.0
        if fixed < 0.0:
            return 0.0, self._xy / self._xx
        return fixed, per_token


def prompt_tokens(output: SchedulerOutput) -> int:
    """Tokens of a step that belong to prompts: who decodes computes one token and its drafts."""
    drafts = output.scheduled_spec_decode_tokens
    scheduled = output.num_scheduled_tokens.items()
    return sum(count for req_id, count in scheduled if count > 1 + len(drafts.get(req_id, ())))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a hit shall be loaded, and the seconds that it was decided by (0 when unknown)."""

    load: bool
    load_seconds: float = 0.0
    compute_seconds: float = 0.0
    is_trial: bool = False
    """Whether the load is made against the expectation, to see whether that still holds."""


LOAD = Verdict(True)


@dataclass(frozen=True, slots=True)
class _Load:
    tokens: int
    began: float
    is_trial: bool


class LoadOrCompute:
    """Measures loads and steps, and decides about hits."""

    def __init__(
        self,
        min_load_tokens: int | None = None,
        *,
        min_step_tokens: int = 1,
        max_step_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``min_load_tokens`` decides alone when it is a number; None measures.

        ``min_step_tokens`` is the least size of a step that is measured, ``max_step_tokens`` what
        vLLM computes in one step at most.
        """
        self._min_load_tokens = min_load_tokens
        self._min_step_tokens = min_step_tokens
        self._max_step_tokens = max_step_tokens
        self._clock = clock
        self._load_line, self._step_line = CostLine(), CostLine()
        # In the order of their beginning.
        self._loads: OrderedDict[str, _Load] = OrderedDict()
        self._steps: deque[tuple[float, int]] = deque(maxlen=MAX_STEPS_UNDER_WAY)
        self._last_step_end = float("-inf")
        self._next_trial = float("-inf")

    def decide(self, tokens: int) -> Verdict:
        """Decides about a hit of ``tokens`` tokens that vLLM does not have itself."""
        if self._min_load_tokens is not None:
            return LOAD if tokens >= self._min_load_tokens else Verdict(False)
        if not (self._load_line.is_known and self._step_line.is_known):
            return LOAD
        load, compute = self.load_seconds(tokens), self.compute_seconds(tokens)
        if load <= compute:
            return Verdict(True, load, compute)
        now = self._clock()
        if now < self._next_trial or any(load.is_trial for load in self._loads.values()):
            return Verdict(False, load, compute)
        # The trial's end sets the pause before the next one; this one is for a request that ends
        # before its load begins.
        self._next_trial = now + MIN_TRIAL_PAUSE_SECONDS
        return Verdict(True, load, compute, is_trial=True)

    def load_seconds(self, tokens: int) -> float:
        """Expected time of a load: by the line, and not less than loads under way suggest."""
        fixed, per_token = self._load_line.parts()
        expected = fixed + per_token * tokens
        oldest = next(iter(self._loads.values()), None)
        if oldest is None:
            return expected
        usual = fixed + per_token * oldest.tokens
        age = self._clock() - oldest.began
        return expected * age / usual if age > usual > 0.0 else expected

    def compute_seconds(self, tokens: int) -> float:
        """Expected time of computing, in steps of at most ``max_step_tokens``."""
        fixed, per_token = self._step_line.parts()
        steps = -(-tokens // self._max_step_tokens) if self._max_step_tokens else 1
        return fixed * steps + per_token * tokens

    # Loads.

    def load_began(self, request_id: str, tokens: int, *, is_trial: bool = False) -> None:
        """Notes that a load was handed to the workers."""
        self._loads[request_id] = _Load(tokens, self._clock(), is_trial)

    def load_ended(self, request_id: str, *, failed: bool) -> None:
        """Notes that all workers are done with a load."""
        load = self._loads.pop(request_id, None)
        if load is None or load.tokens <= 0:
            return
        now = self._clock()
        seconds = now - load.began
        # A load that fails at once costs nothing, and says nothing about those that do not.
        if failed and seconds <= self.load_seconds(load.tokens):
            self._end_trial(load, now, seconds)
            return
        if load.is_trial and not failed and seconds < self.compute_seconds(load.tokens):
            # What made loads slow is over: what was measured meanwhile does not count any more.
            self._load_line.clear()
            for _ in range(MIN_SAMPLES):
                self._load_line.add(load.tokens, seconds)
        else:
            self._load_line.add(load.tokens, seconds)
        self._end_trial(load, now, seconds)

    def forget(self, request_id: str) -> None:
        """Forgets a load whose request ended before it."""
        load = self._loads.pop(request_id, None)
        if load is not None:
            now = self._clock()
            self._end_trial(load, now, now - load.began)

    def _end_trial(self, load: _Load, now: float, seconds: float) -> None:
        if load.is_trial:
            pause = TRIAL_PAUSE_FACTOR * seconds
            pause = min(max(pause, MIN_TRIAL_PAUSE_SECONDS), MAX_TRIAL_PAUSE_SECONDS)
            self._next_trial = now + pause

    # Steps.

    def step_began(self, prompt_tokens: int, all_tokens: int) -> None:
        """Notes that a step was handed to the workers; of its tokens, so many are of prompts."""
        counts = (
            prompt_tokens >= self._min_step_tokens and prompt_tokens >= PREFILL_SHARE * all_tokens
        )
        self._steps.append((self._clock(), all_tokens if counts else 0))

    def step_ended(self) -> None:
        """Notes that the oldest step under way is done.

        vLLM hands the next step over before the last is done; it begins when that ends.
        """
        if not self._steps:
            return
        began, tokens = self._steps.popleft()
        now = self._clock()
        seconds = now - max(began, self._last_step_end)
        self._last_step_end = now
        if tokens > 0 and seconds > 0.0:
            self._step_line.add(tokens, seconds)

    # Reporting.

    def gauges(self) -> dict[str, float]:
        """Tokens per second of loads and of computing prompts, as far as they are known."""
        rates = {
            "load_tokens_per_second": self._load_line,
            "prefill_tokens_per_second": self._step_line,
        }
        return {name: line.tokens_per_second for name, line in rates.items() if line.is_known}
