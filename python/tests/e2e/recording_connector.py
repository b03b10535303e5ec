"""kvrail's connector, watched: it records the bytes of every block stored and loaded.

vLLM loads it by `kv_connector_module_path`. The bytes are read from vLLM's own tensors, not from
where kvrail thinks they lie. Each event is one line of JSON in the file that `E2E_RECORD` names.
The file that `E2E_CONTROL` names, when it exists, says what damage to do to loads: the negative
controls.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

import kvrail._core as core

_kv_caches: dict[str, list[torch.Tensor]] = {}
"""Of each layer; a state may be several tensors."""
_layers: list[list[str]] = []
"""The names of each group's layers."""
_real_store = core.Store


class RecordingStore:
    """A store whose attached memory records what passes through it."""

    def __init__(self, config: Any, namespace: Any, **options: Any) -> None:
        self._store = _real_store(config, namespace, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def attach(self, *arguments: Any, **options: Any) -> Any:
        """Attaches, and watches what is attached."""
        cache = self._store.attach(*arguments, **options)
        return RecordingKvCache(cache, options.get("group", 0), options.get("rank", 0))


class RecordingKvCache:
    """Memory of a group on a rank; records blocks before stores and after loads."""

    def __init__(self, cache: Any, group: int, rank: int | tuple[int, int, int]) -> None:
        self._cache = cache
        self._place = {"group": group, "rank": rank, "number": _number(rank)}
        self._part = "{}h{}-{}".format(*rank) if isinstance(rank, tuple) else str(rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def store(self, chunks: Sequence[tuple[bytes, bytes | None, Sequence[int]]]) -> Any:
        """Stores; the bytes are recorded before, as kvrail must have copied them on return."""
        for key, parent, block_ids in chunks:
            _record(
                event="store",
                **self._place,
                key=key.hex(),
                parent=parent.hex() if parent else None,
                blocks=[block_hash(self._place["group"], block) for block in block_ids],
            )
        ticket = self._cache.store(chunks)
        _kill("store", self._place["number"])
        return ticket

    def load(self, chunks: Sequence[tuple[bytes, bytes | None, int, Sequence[int]]]) -> Any:
        """Loads; chunks vanish before it if the control says so."""
        control = _control()
        number = self._place["number"]
        if control in ("delete", f"delete {number}"):
            for key, *_ in chunks[-1:]:
                _delete(key.hex(), "*" if control == "delete" else self._part)
        ticket = self._cache.load(chunks)
        _kill("load", number)
        return RecordingTicket(ticket, chunks, self._place, control)


class RecordingTicket:
    """A load under way; records the blocks once, when it is done."""

    def __init__(
        self, ticket: Any, chunks: Sequence[Any], place: dict[str, Any], control: str
    ) -> None:
        self._ticket = ticket
        self._chunks = chunks
        self._place = place
        self._control = control
        self._report: Any = None

    def poll(self) -> Any:
        """The report, once the load is done and recorded."""
        return self._done(self._ticket.poll())

    def wait(self, limit_seconds: float) -> Any:
        """The report, after a wait."""
        return self._done(self._ticket.wait(limit_seconds))

    def _done(self, report: Any) -> Any:
        if report is None or self._report is not None:
            return self._report
        self._report = report
        group = self._place["group"]
        _tamper(self._control, group, self._chunks[0][3])
        for index, (key, _, first_block, block_ids) in enumerate(self._chunks):
            _record(
                event="load",
                **self._place,
                key=key.hex(),
                first_block=first_block,
                blocks=[block_hash(group, block) for block in block_ids],
                failed=index in report.failed,
            )
        return report


def block_hash(group: int, block: int) -> str:
    """SHA-256 of one block's bytes over all layers of its group, in the order of the layers."""
    digest = hashlib.sha256()
    for layer in _layers[group]:
        for tensor in _kv_caches.get(layer, []):
            digest.update(tensor[block].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tamper(control: str, group: int, block_ids: Sequence[int]) -> None:
    for tensor in (tensor for layer in _layers[group] for tensor in _kv_caches.get(layer, [])):
        if control in ("zero", f"zero {group}"):
            tensor[block_ids[0]].zero_()
        elif control == "swap":
            first, second = block_ids[0], block_ids[1]
            kept = tensor[first].clone()
            tensor[first].copy_(tensor[second])
            tensor[second].copy_(kept)


def _control() -> str:
    path = os.environ.get("E2E_CONTROL")
    return Path(path).read_text() if path and os.path.exists(path) else ""


def _number(rank: int | tuple[int, int, int]) -> int:
    """The number of a rank that has a pipeline stage's heads, or is named by its number."""
    if isinstance(rank, int):
        return rank
    stage, first, end = rank
    return stage + first // (end - first)


def _delete(key: str, rank: str) -> None:
    for path in Path(os.environ["E2E_STORE"]).glob(f"*/g*r{rank}/*/{key}.safetensors"):
        path.unlink()


def _kill(operation: str, rank: int) -> None:
    """Ends this process, as the kernel does when memory is short, while its operation runs."""
    if _control() == f"kill {operation} {rank}":
        # The store's threads are at it by then.
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)


def _record(**event: Any) -> None:
    line = json.dumps(event | {"process": os.getpid(), "at": time.time()}) + "\n"
    # One write to a file opened for appending is not mixed with another process's.
    target = os.open(os.environ["E2E_RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(target, line.encode())
    finally:
        os.close(target)


core.Store = RecordingStore  # type: ignore

from kvrail.vllm import KvrailConnector  # noqa: E402  (after the store was replaced)


class RecordingConnector(KvrailConnector):
    """`KvrailConnector` with the store above underneath."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Keeps which layers there are."""
        super().__init__(vllm_config, role, kv_cache_config)
        _layers[:] = [list(group.layer_names) for group in kv_cache_config.kv_cache_groups]

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keeps the tensors, to read the blocks from."""
        _kv_caches.clear()
        for layer, found in kv_caches.items():
            _kv_caches[layer] = list(found) if isinstance(found, (list, tuple)) else [found]
        super().register_kv_caches(kv_caches)

    def on_new_request(self, request: Any) -> None:
        """Records the request's block hashes, from which chunk keys come."""
        _record(
            event="request",
            prompt=hashlib.sha256(json.dumps(list(request.prompt_token_ids)).encode()).hexdigest(),
            salt=request.cache_salt,
            hashes=[bytes(block).hex() for block in request.block_hashes],
        )
        super().on_new_request(request)

    def take_events(self) -> list[Any]:
        """Records the KV events that vLLM is given to publish."""
        events = list(super().take_events())
        for event in events:
            fields = msgspec.to_builtins(event, builtin_types=(bytes,))
            hashes = [str(block) for block in fields.pop("block_hashes")]
            fields.pop("parent_block_hash", None)
            _record(event="kv event", kind=type(event).__name__, hashes=hashes, fields=fields)
        return events
