"""What must be equal for the bytes of two of LMCache's objects to be interchangeable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvrail._core import Namespace, SlabStore

if TYPE_CHECKING:
    import torch

OBJECT_VERSION = 1
"""Goes up when the same objects would get other names or bytes."""

KEY_BYTES_MIN, KEY_BYTES_MAX = 8, 32


class ObjectKind(NamedTuple):
    """Model and layout of an object; LMCache's keys do not hold the layout.

    Two models served under one name with equal layouts are one to LMCache, and so to kvrail.
    """

    model: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the object's parts, in elements."""
    dtypes: tuple[str, ...]
    object_bytes: int

    @classmethod
    def of(
        cls, model: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
    ) -> ObjectKind:
        """The kind of the objects of a model with parts of these shapes and types."""
        parts = zip(shapes, dtypes, strict=True)
        object_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
        names = tuple(str(dtype) for dtype in dtypes)
        return cls(model, tuple(tuple(shape) for shape in shapes), names, object_bytes)

    def register(self, store: SlabStore) -> int:
        """The number of this kind in a store.

        Raises ``ConfigError`` when there are too many kinds, or one object is larger than the slab.
        """
        identity: dict[str, Any] = {
            "engine": "lmcache",
            "object_version": OBJECT_VERSION,
            "shapes": self.shapes,
            "dtypes": self.dtypes,
            "object_bytes": self.object_bytes,
        }
        return store.kind(Namespace(self.model, json.dumps(identity)), self.object_bytes)


def chunk_key(chunk_hash: bytes, cache_salt: str) -> bytes:
    """kvrail's key for an object: LMCache's hash, or a hash over it and the salt.

    A salted key is no other's: to find a hash of 32 bytes that equals it is as hard as to break
    SHA-256. A hash of a length that is no key is hashed as well.
    """
    if not cache_salt and KEY_BYTES_MIN <= len(chunk_hash) <= KEY_BYTES_MAX:
        return chunk_hash
    digest = hashlib.sha256(b"kvrail lmcache key")
    digest.update(len(chunk_hash).to_bytes(8, "little") + chunk_hash + cache_salt.encode())
    return digest.digest()
