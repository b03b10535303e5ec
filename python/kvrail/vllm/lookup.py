"""The scheduler's own, read-only store, opened from what the workers report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrail._core import Config, Namespace, PresenceTicket, Store
from kvrail.vllm.boundary import BoundaryTicket
from kvrail.vllm.config import effective_value
from kvrail.vllm.geometry import GroupGeometry
from kvrail.vllm.lmcache_files import names_of_identity
from kvrail.vllm.metadata import KvrailHandshake, Part
from kvrail.vllm.request_state import Ticket


class DisagreementError(RuntimeError):
    """The workers do not form one namespace; the message names what differs."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all workers of one engine agree on."""

    model: str
    identity_json: str
    parts: tuple[tuple[Part, ...], ...]
    """What a hit needs of each KV cache group: each distinct part that a worker reads."""
    none_hash: str


def agree(handshakes: Mapping[tuple[int, int], object], expected_workers: int) -> Agreement | str:
    """Merges the handshakes of all workers, or returns why nothing is stored.

    Raises ``DisagreementError`` when workers are missing or differ.
    """
    known = {
        rank: shake for rank, shake in handshakes.items() if isinstance(shake, KvrailHandshake)
    }
    if len(known) != expected_workers:
        raise DisagreementError(f"{len(known)} of {expected_workers} workers reported")
    reasons = [shake.reason for _, shake in sorted(known.items()) if shake.reason is not None]
    if reasons:
        return reasons[0]
    first_rank = min(known)
    first = known[first_rank]
    for rank, shake in sorted(known.items()):
        keys = differing_keys(first.identity_json, shake.identity_json)
        if keys:
            raise DisagreementError(
                f"ranks (pipeline, tensor) {first_rank} and {rank} differ in {', '.join(keys)}"
            )
    identity = json.loads(first.identity_json)
    return Agreement(
        model=first.model,
        identity_json=first.identity_json,
        parts=tuple(
            tuple(dict.fromkeys(parts))
            for parts in zip(*(shake.parts for _, shake in sorted(known.items())), strict=True)
        ),
        none_hash=identity["prefix_hash"]["none_hash"],
    )


def differing_keys(ours: str, theirs: str) -> list[str]:
    """Keys of two identities, given as JSON objects, whose values differ."""
    if ours == theirs:
        return []
    left: dict[str, Any] = json.loads(ours)
    right: dict[str, Any] = json.loads(theirs)
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


class LookupStore:
    """A store that is asked for keys only and never creates or writes anything."""

    def __init__(
        self,
        config: Config,
        agreement: Agreement,
        cpus: Sequence[int] | None,
        groups: Sequence[GroupGeometry],
        open_store: Callable[..., Store] = Store,
    ) -> None:
        namespace = Namespace(agreement.model, agreement.identity_json)
        options: dict[str, Any] = {}
        if effective_value(config, "layout") == "lmcache":
            options["lmcache"] = names_of_identity(agreement.identity_json)
        self.store = open_store(config, namespace, read_only=True, quiet=True, cpus=cpus, **options)
        self._groups = tuple(groups)
        indices = (group.index for group in self._groups)
        self._parts = dict(zip(indices, agreement.parts, strict=True))

    def lookup(self, keys: Sequence[bytes]) -> Ticket:
        """Asks for the longest prefix of `keys` at whose end all groups can go on, on all ranks."""
        if len(self._groups) == 1 and not self._groups[0].is_windowed:
            return self._lookup_prefix(keys, self._groups[0].index)
        return BoundaryTicket(self._lookup_prefix, self._lookup_each, self._groups, keys)

    def _lookup_prefix(self, keys: Sequence[bytes], group: int) -> Ticket:
        return self.store.lookup(keys, group=group, ranks=self._parts[group])

    def _lookup_each(self, keys: Sequence[bytes], group: int) -> PresenceTicket:
        return self.store.lookup_each(keys, group=group, ranks=self._parts[group])
