"""The weights that a worker has in memory: whether they are still those that vLLM loaded.

A namespace stands for the weights of files. vLLM can replace those in memory while it runs: it
loads them again, or a trainer writes into them, with no file and no call that a connector sees.
What it does call then is a reset of its caches, so after each of those the weights are looked at.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Sums of 64-bit words, one for each row of this many and one for each column: any word that changes
# alters two of them, and words that change places alter them, too. 16 GB of weights leave 16 MB of
# sums to be hashed on the CPU, and are read twice where they lie, which at 3 TB/s takes 11 ms.
ROW_WORDS = 1024
_WORD_BYTES = 8
_ROW_BYTES = ROW_WORDS * _WORD_BYTES
# Weights whose bytes do not lie in one piece are copied in pieces of this size: a GPU that serves
# has no room for another matrix of embeddings.
_PIECE_BYTES = 64 << 20
# Scales of the KV cache, which vLLM keeps in buffers (`set_default_quant_scales`). Other buffers
# are left out: some are scratch memory.
_SCALE_BUFFERS = frozenset({"_k_scale", "_v_scale", "_q_scale", "_prob_scale"})

Models = Callable[[], "Sequence[torch.nn.Module]"]


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """What a worker found when it was asked for its weights."""

    digest: str
    """Hex SHA-256 of this rank's weights; empty where there is a problem."""
    is_as_loaded: bool
    """Whether they are what they were when vLLM started."""
    problem: str | None = None
    """Why they cannot be told, or None."""


class LoadedWeights:
    """The weights of a worker's models, and what they were when this was made."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._at_start = self._look()

    @classmethod
    def of_maker(cls) -> LoadedWeights:
        """The weights of the worker that is making a connector, which is found on the stack.

        vLLM gives connectors no way to the model. A call with the stack as its only way is better
        than answers of other weights.
        """
        return cls(_models_of(_worker_on_stack()))

    def report(self) -> WeightsReport:
        """What the weights are now. It reads all of them, and waits for the device."""
        now = self._look()
        if now.problem is not None or self._at_start.problem is not None:
            problem = now.problem or self._at_start.problem
            return WeightsReport("", False, problem)
        return WeightsReport(now.digest, now.digest == self._at_start.digest)

    def _look(self) -> WeightsReport:
        try:
            return WeightsReport(digest_models(self._models()), True)
        except Exception as error:
            # Models of any kind and tensors of any class come here; none may end a request.
            return WeightsReport("", False, f"the weights in memory cannot be read: {error!r}")


def digest_models(models: Sequence[torch.nn.Module]) -> str:
    """Hex SHA-256 over names, types, shapes and contents of what makes KV in ``models``."""
    if not models:
        raise LookupError("no model was found")
    digest = hashlib.sha256()
    parts: list[torch.Tensor] = []
    for index, model in enumerate(models):
        for name, tensor in _weights_and_scales(model):
            about = f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}\n"
            digest.update(about.encode())
            parts.extend(_sums(tensor.detach()))
    for part in _on_cpu(parts):
        digest.update(part)
    return digest.hexdigest()


def _weights_and_scales(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters of a model, and the scales of its KV cache."""
    # vLLM's own list of what its weights are, with what tensors of special classes hold inside.
    from vllm.model_executor.model_loader.weight_checksum import _weights

    yield from _weights(model)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in _SCALE_BUFFERS:
            yield name, buffer


def _sums(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What stands for a tensor's bytes, on its device, as flat tensors of bytes."""
    import torch

    for piece in _pieces(tensor):
        data = piece.reshape(-1).view(torch.uint8)
        rows = data.numel() // _ROW_BYTES
        if data.storage_offset() % _WORD_BYTES:
            data = data.clone()
        if rows:
            words = data[: rows * _ROW_BYTES].view(torch.int64).view(rows, ROW_WORDS)
            # Sums wrap around, as all integers of PyTorch do.
            yield words.sum(dim=1).view(torch.uint8)
            yield words.sum(dim=0).view(torch.uint8)
        rest = data[rows * _ROW_BYTES :]
        if rest.numel():
            # A copy: what is collected must not follow what the weights become.
            yield rest.clone()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in contiguous pieces: itself where its bytes lie in one, in whatever order."""
    if tensor.numel() == 0:
        return
    # Kernels like some weights transposed: then their bytes are all there in another order.
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    tensor = tensor.permute(order)
    if tensor.is_contiguous():
        yield tensor
        return
    row_bytes = tensor[0].numel() * tensor.element_size()
    for piece in tensor.split(max(1, _PIECE_BYTES // row_bytes)):
        yield piece.contiguous()


def _on_cpu(parts: Sequence[torch.Tensor]) -> Iterator[bytes]:
    """The bytes of all parts, fetched from each device at once."""
    import torch

    devices: dict[torch.device, list[torch.Tensor]] = {}
    for part in parts:
        devices.setdefault(part.device, []).append(part)
    for _, tensors in sorted(devices.items(), key=lambda item: str(item[0])):
        yield torch.cat(tensors).cpu().numpy().tobytes()


def _worker_on_stack() -> object | None:
    from vllm.v1.worker.worker_base import WorkerBase

    frame = sys._getframe().f_back
    while frame is not None:
        maker = frame.f_locals.get("self")
        if isinstance(maker, WorkerBase):
            return maker
        frame = frame.f_back
    return None


def _models_of(worker: object | None) -> Models:
    """The worker's model and its draft model, where it has one; asked for anew each time."""
    # The worker has the connector already, and its model is most of a GPU's memory.
    known = (lambda: None) if worker is None else weakref.ref(worker)

    def models() -> list[torch.nn.Module]:
        worker: Any = known()
        if worker is None:
            return []
        found = [worker.get_model()]
        draft = getattr(worker, "get_draft_model", None)
        draft_model = draft() if draft is not None else None
        return found if draft_model is None else [*found, draft_model]

    return models
