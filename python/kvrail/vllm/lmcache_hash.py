"""The chunk hashes of LMCache 0.5.6, for the same tokens; see docs/format-lmcache.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from kvrail.vllm.layout import UnsupportedModelError

PREFIX = "lmcache/"
"""What comes before LMCache's name of an algorithm in a namespace's identity."""
BUILTIN = "builtin"
_BITS = 64


class LmcacheHasher:
    """LMCache's hash of a chunk: of its tokens, and of the hash of the chunk before.

    Keys are the 64 bits of the hash, big-endian. Nothing but tokens goes into them.
    """

    def __init__(self, algorithm: str, start: int) -> None:
        """Raises ``ValueError`` for an algorithm that this vLLM has not."""
        self.algorithm = algorithm
        self._start = start
        self._hash: Callable[[object], int] = hash
        if algorithm != BUILTIN:
            self._hash = _digest_hash(algorithm)

    @classmethod
    def of_process(cls, algorithm: str) -> LmcacheHasher:
        """The hasher of this process, as LMCache would make it here.

        Raises ``UnsupportedModelError`` where the first hash of a chain is another one in each
        process.
        """
        seed = os.environ.get("PYTHONHASHSEED")
        if algorithm == BUILTIN:
            # A seed that was set after the interpreter's start has changed nothing about it.
            is_late = seed == "0" and bool(sys.flags.hash_randomization)
            if seed is None or seed == "random" or is_late:
                raise _random_start(algorithm)
            return cls(algorithm, hash(seed))
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

        function = get_hash_fn_by_name(algorithm)
        if resolve_none_hash_seed(function) != resolve_none_hash_seed(function):
            raise _random_start(algorithm)
        return cls(algorithm, _fold(function(resolve_none_hash_seed(function))))

    @classmethod
    def from_key(cls, algorithm: str, start: bytes) -> LmcacheHasher:
        """The hasher whose chains start from a key, as an identity has it."""
        return cls(algorithm, int.from_bytes(start, "big", signed=algorithm == BUILTIN))

    @property
    def has_sign(self) -> bool:
        """Whether hashes are numbers with a sign."""
        return self.algorithm == BUILTIN

    @property
    def start_key(self) -> bytes:
        """The bits of what stands before the first chunk."""
        return self._bits(self._start)

    def key(self, tokens: Sequence[int], previous: bytes | None) -> bytes:
        """The key of a chunk of ``tokens`` behind the chunk with the key ``previous``."""
        before = self._start
        if previous is not None:
            before = int.from_bytes(previous, "big", signed=self.has_sign)
        return self._bits(self._hash((before, tuple(tokens), ())))

    def _bits(self, number: int) -> bytes:
        return (number % (1 << _BITS)).to_bytes(_BITS // 8, "big")


def _digest_hash(algorithm: str) -> Callable[[object], int]:
    from vllm.utils.hashing import get_hash_fn_by_name

    function = get_hash_fn_by_name(algorithm)
    return lambda value: _fold(function(value))


def _fold(digest: bytes) -> int:
    """The number that LMCache makes of a digest."""
    return int.from_bytes(digest[: _BITS // 8], "big")


def _random_start(algorithm: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"LMCache's hashes ({algorithm}) start from a random value in each process; set "
        "PYTHONHASHSEED to the same number for all instances, before Python starts"
    )
