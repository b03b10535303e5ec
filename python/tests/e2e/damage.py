"""Every way in which a chunk file can be bad, each as a function that makes it so."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Damage:
    """How to damage a chunk file."""

    apply: Callable[[Path, Path], None]
    """Called with the chunk file and another prompt's good chunk file."""
    chunk: int
    """Which chunk of the prompt is damaged; those before it are still good."""
    leaves_file: bool = True
    """Whether there is something to set aside."""


def payload_bytes(path: Path) -> int:
    """Bytes of the payload, as the head says."""
    with path.open("rb") as file:
        head = json.loads(file.read(PAGE_BYTES)[8:])
    begin, end = head["kvcache"]["data_offsets"]
    return int(end) - int(begin)


def _flip(offset: Callable[[Path], int]) -> Callable[[Path, Path], None]:
    def apply(path: Path, other: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset(path))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))

    return apply


def _resize(change: Callable[[int], int]) -> Callable[[Path, Path], None]:
    return lambda path, other: os.truncate(path, change(path.stat().st_size))


def _replace_by_other(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def _replace_by_directory(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path, other: Path) -> None:
    # The target holds the right bytes: only that it lies outside makes the chunk bad.
    store = path.parents[3]
    outside = store.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def _replace_by_pipe(path: Path, other: Path) -> None:
    # Whoever opens a pipe that nobody writes to without care waits for ever.
    path.unlink()
    os.mkfifo(path)


def _make_unreadable(path: Path, other: Path) -> None:
    path.chmod(0)


def _leave(path: Path, other: Path) -> None:
    """The test connector deletes the file after the lookup has found it."""


DAMAGES = {
    "bit in first page": Damage(_flip(lambda path: PAGE_BYTES + 100), 1),
    "bit in middle page": Damage(_flip(lambda path: PAGE_BYTES + payload_bytes(path) // 2), 0),
    "bit in last page": Damage(_flip(lambda path: PAGE_BYTES + payload_bytes(path) - 1), 1),
    "bit in page table": Damage(_flip(lambda path: PAGE_BYTES + payload_bytes(path) + 9), 1),
    "bit in head": Damage(_flip(lambda path: path.read_bytes().index(b"format")), 1),
    "bit in head length": Damage(_flip(lambda path: 2), 0),
    "truncated": Damage(_resize(lambda size: size // 2 // PAGE_BYTES * PAGE_BYTES), 1),
    "truncated by a byte": Damage(_resize(lambda size: size - 1), 0),
    "empty": Damage(_resize(lambda size: 0), 1),
    "grown by a page": Damage(_resize(lambda size: size + PAGE_BYTES), 1),
    "grown by a byte": Damage(_resize(lambda size: size + 1), 0),
    "other chunk": Damage(_replace_by_other, 1),
    "directory": Damage(_replace_by_directory, 1),
    "link that leaves the store": Damage(_replace_by_link, 1),
    "pipe": Damage(_replace_by_pipe, 1),
    "unreadable": Damage(_make_unreadable, 1),
    "deleted after lookup": Damage(_leave, 1, leaves_file=False),
}
