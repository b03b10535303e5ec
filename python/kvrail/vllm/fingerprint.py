"""Fingerprints of model and adapter folders.

Reading every byte of a large model at each start would take minutes, so a fingerprint covers the
configuration, the name and size of every weight file, and a sample of its content. Pages spread
evenly over a file find any training that changed the tensors there; the head of a file holds its
index. Scales of a quantized KV cache are a few bytes that a calibration changes alone, so all of
them are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(f"vllm.{__name__}")

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
CONFIG_NAMES = ("config.json", "adapter_config.json", "model.safetensors.index.json")
HEAD_BYTES = 64 * 1024
PAGE_BYTES = 4096
# One page in every 64th of a file. With 30 files this is 8 MB to read, mostly from the page cache,
# because the weights have been loaded just before.
SAMPLED_PAGES = 64
# Names that vLLM's `maybe_remap_kv_scale_name` knows: `k_scale`, `v_proj.output_scale`, `kv_scale`.
KV_SCALE = re.compile(
    r"(^|[._])(q|k|v|kv|qkv|prob)(_proj)?[._](cache[._])?(output_)?(zero_point|scale)$"
)
# Far more than one for each head.
SCALE_BYTES_MAX = 1 << 20
# The limit of the safetensors library.
HEADER_BYTES_MAX = 100_000_000
# Far more than one vLLM serves.
ADAPTERS_MAX = 65_536

FileStates = dict[str, tuple[int, int, int]]
"""Size, time of modification and inode of files, by path."""


class FingerprintError(RuntimeError):
    """The weights cannot be identified, so nothing computed with them may be shared."""


def fingerprint_path(path: Path) -> str:
    """Hex SHA-256 that identifies the weights in a folder or a single weight file.

    Raises ``FingerprintError`` when there are no weight files or they cannot be read.
    """
    try:
        configs, files = _files(path)
        if not files:
            raise FingerprintError(f"no weight files in {path}")
        digest = hashlib.sha256()
        root = path.parent if path.is_file() else path
        for config in configs:
            _add(digest, config.name.encode(), config.read_bytes())
        for file in files:
            _add(digest, file.relative_to(root).as_posix().encode(), b"")
            _add_sample(digest, file)
        return digest.hexdigest()
    except OSError as error:
        raise FingerprintError(f"cannot read the weights in {path}: {error}") from error


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The configurations and the weight files that a fingerprint is made of."""
    root = path.parent if path.is_file() else path
    configs = [file for name in CONFIG_NAMES if (file := root / name).is_file()]
    return configs, [path] if path.is_file() else sorted(_weight_files(path))


def _weight_files(folder: Path) -> Iterable[Path]:
    """Weight files of a folder and of the folders one level below it."""
    for pattern in ("*", "*/*"):
        for file in folder.glob(pattern):
            if file.suffix in WEIGHT_SUFFIXES and file.is_file():
                yield file


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    # Lengths keep two different lists of parts from having the same concatenation.
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _add_kv_scales(digest: hashlib._Hash, stream: BinaryIO, size: int) -> None:
    """Adds the KV cache's scales of a safetensors file; nothing for any other file."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(HEADER_BYTES_MAX, size - 8):
        return
    try:
        header = json.loads(stream.read(length))
        places = {
            str(name): [int(at) for at in entry["data_offsets"]]
            for name, entry in header.items()
            if KV_SCALE.search(name)
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        # vLLM has loaded it all the same, so it is a file of another kind.
        return
    for name, (begin, end) in sorted(places.items()):
        stream.seek(8 + length + begin)
        _add(digest, name.encode(), stream.read(min(max(0, end - begin), SCALE_BYTES_MAX)))


def _add_sample(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        stream.seek(0)
        _add(digest, stream.read(HEAD_BYTES))
        last = max(0, size - PAGE_BYTES)
        for index in range(SAMPLED_PAGES):
            stream.seek(last * index // (SAMPLED_PAGES - 1))
            _add(digest, stream.read(PAGE_BYTES))
        if file.suffix == ".safetensors":
            _add_kv_scales(digest, stream, size)


def resolve_model_path(model: str, revision: str | None, download_dir: str | None) -> Path:
    """The local folder or file of a model that vLLM has loaded; never downloads anything.

    Raises ``FingerprintError`` when the model is not on a file system that can be read here.
    """
    local = Path(model).expanduser()
    if local.exists():
        return local
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            model, revision=revision, cache_dir=download_dir, local_files_only=True
        )
    except Exception as error:
        # The hub client raises errors of many kinds here, and all mean the same: no local snapshot.
        raise FingerprintError(f"no local files of the model {model}: {error}") from error
    return Path(folder)


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What was read of an adapter, and the files as they were right before."""

    fingerprint: bytes
    files: FileStates


class AdapterFingerprints:
    """Fingerprints of LoRA adapters, read once per adapter and process.

    vLLM's block hashes hold an adapter's name and path. That is enough within one process, but
    files outlive the process, and an adapter that is trained again keeps both.

    vLLM drops adapters that it has no room for and loads them again from their path, when it likes.
    So nobody knows which weights are in use of an adapter whose files have changed since they were
    read. vLLM's own prefix cache does not know either, also of one that is registered anew.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Adapter | None] = {}

    def of(self, lora_request: object) -> bytes | None:
        """The adapter's fingerprint, or None when its KV cache must not be shared."""
        # Such a request replaces a loaded adapter by what its path holds now, which a fingerprint
        # that was read once does not follow.
        if getattr(lora_request, "load_inplace", False):
            return None
        name = str(getattr(lora_request, "lora_name", ""))
        path = str(getattr(lora_request, "lora_path", ""))
        # As in vLLM's block hashes, which know nothing of an adapter's number.
        key = (name, path)
        if key not in self._known:
            # None is forgotten: read again, changed files would pass for those that vLLM loaded.
            if len(self._known) >= ADAPTERS_MAX:
                return None
            self._known[key] = _read_adapter(path)
        adapter = self._known[key]
        if adapter is None:
            return None
        if _adapter_files(path) != adapter.files:
            self._known[key] = None
            logger.warning(
                "kvrail: the files of the adapter %s in %s have changed, so it is not known which "
                "of them vLLM uses: its requests are neither stored nor loaded until vLLM restarts",
                name,
                path,
            )
            return None
        return adapter.fingerprint


def _read_adapter(path: str) -> _Adapter | None:
    # Files that change while they are read differ from what they were before.
    files = _adapter_files(path)
    if files is None:
        return None
    try:
        fingerprint = fingerprint_path(resolve_model_path(path, None, None))
    except FingerprintError:
        return None
    return _Adapter(bytes.fromhex(fingerprint), files)


def _adapter_files(path: str) -> FileStates | None:
    """The files that an adapter's fingerprint is made of, as they are now; None without them."""
    try:
        configs, weights = _files(resolve_model_path(path, None, None))
        states = {}
        for file in (*configs, *weights):
            found = file.stat()
            states[str(file)] = (found.st_size, found.st_mtime_ns, found.st_ino)
        return states
    except (FingerprintError, OSError):
        return None
