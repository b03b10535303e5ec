"""Which weights chunk keys stand for: those of the namespace, or others that vLLM has by now.

A reset of vLLM's caches may mean that its weights were replaced, or nothing of the kind: sleep mode
and benchmarks reset them, too. So the workers are asked, and until all of them have answered no key
is made. They are asked with the next step that computes, or that a request waits for: a trainer
resets the caches, then replaces the weights and has vLLM go on, and in between, also while vLLM
sleeps and has no weights at all, steps are run for requests that were aborted. With other weights
than at the start each key is hashed once more, with a salt made of what the workers read: engines
with the same weights share chunks again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool

    from kvrail.vllm.loaded_weights import WeightsReport

logger = logging.getLogger(f"vllm.{__name__}")

Reports = Mapping[tuple[int, int], "WeightsReport"]
"""What workers found, by the number of the question and the worker's rank."""


class WeightsWatch:
    """Notices resets, asks the workers, and has the salt of chunk keys.

    ``changeable`` says whether keys of other weights can be made at all. ``workers`` is how many
    have to answer.
    """

    def __init__(
        self,
        *,
        workers: int,
        wait_limit_seconds: float,
        clock: Callable[[], float],
        changeable: bool = True,
    ) -> None:
        self._workers = workers
        self._wait_limit_seconds = wait_limit_seconds
        self._clock = clock
        self._changeable = changeable
        self._pool: BlockPool | None = None
        self._blocks_seen: object = None
        self._question = 0
        self._is_asked = True
        self._is_awaited = False
        self._asked_at: float | None = None
        self._answers: dict[int, WeightsReport] = {}
        self._refused = False
        self.is_known = True
        """Whether keys can be made."""
        self.salt = b""
        """What goes into chunk keys beside vLLM's hash; empty for the weights of the namespace."""

    def follow(self, pool: BlockPool) -> None:
        """Notices from here on when vLLM resets its own prefix cache."""
        if not hasattr(pool, "cached_block_hash_to_block"):
            # Of a newer vLLM. Its start must not end for that.
            logger.warning(
                "kvrail: resets of this vLLM's prefix cache are not seen; reset connectors with it "
                "(reset_connector, reset_external) when weights are replaced"
            )
            return
        self._pool = pool
        self._blocks_seen = pool.cached_block_hash_to_block

    def saw_reset(self) -> bool:
        """Whether vLLM's prefix cache was reset since the last call.

        Trainers reset that one alone, and vLLM tells connectors only if it is asked to. Its pool
        has a new map of blocks then.
        """
        if self._pool is None or self._pool.cached_block_hash_to_block is self._blocks_seen:
            return False
        self._blocks_seen = self._pool.cached_block_hash_to_block
        return True

    def doubt(self) -> None:
        """Takes the weights for unknown, until all workers have answered anew."""
        self._question += 1
        self._is_asked = False
        self._asked_at = None
        self._answers.clear()
        self._refused = False
        self.is_known = False

    @property
    def may_wait(self) -> bool:
        """Whether an answer is still to be expected; asked of a request that would wait for it."""
        if self.is_known or self._refused:
            return False
        self._is_awaited = True
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
        return now - self._asked_at <= self._wait_limit_seconds

    def take_question(self, *, computes: bool) -> int | None:
        """The number of the question for the workers, once; None when there is none.

        ``computes`` says whether the step that takes it along computes anything. vLLM asks for
        requests that are to be computed only, so one that was asked for since the last step and
        waits is as good.
        """
        is_awaited, self._is_awaited = self._is_awaited, False
        if self._is_asked or not (computes or is_awaited):
            return None
        self._is_asked = True
        return self._question

    def take_answers(self, reports: Reports) -> bool:
        """Whether with these answers the weights are known now."""
        for (question, rank), report in reports.items():
            if question == self._question:
                self._answers[rank] = report
        if self.is_known or self._refused or len(self._answers) < self._workers:
            return False
        problem = self._problem()
        if problem is not None:
            self._refused = True
            logger.error(
                "kvrail: nothing is stored or loaded until vLLM starts again or its prefix cache "
                "is reset again: %s",
                problem,
            )
            return False
        before, self.salt = self.salt, self._new_salt()
        self.is_known = True
        if self.salt != before:
            logger.info(
                "kvrail: vLLM has %s; chunks are stored and found under these only",
                f"other weights than at its start ({self.salt.hex()[:12]})"
                if self.salt
                else "the weights of its start again",
            )
        return True

    def _problem(self) -> str | None:
        for rank, report in sorted(self._answers.items()):
            if report.problem is not None:
                return f"worker {rank}: {report.problem}"
        if not self._changeable and not self._are_as_loaded():
            return "vLLM has other weights than at its start, and LMCache's hashes name no weights"
        return None

    def _are_as_loaded(self) -> bool:
        return all(report.is_as_loaded for report in self._answers.values())

    def _new_salt(self) -> bytes:
        if self._are_as_loaded():
            return b""
        salt = hashlib.sha256(b"kvrail weights")
        for _, report in sorted(self._answers.items()):
            salt.update(bytes.fromhex(report.digest))
        return salt.digest()
