"""Every way in which a chunk file goes bad, done to a file at a path."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 4096


def _flip(path: Path, offset: int) -> None:
    """Flips one bit; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def _table_offset(path: Path, payload_bytes: int) -> int:
    return HEAD_BYTES + -(-payload_bytes // 4096) * 4096


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("that is not ours")


def _replace_by_link(path: Path, outside: Path) -> None:
    """A link to a good copy of the chunk: only where it leads is wrong."""
    shutil.move(path, outside)
    path.symlink_to(outside)


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# Name -> (path, payload bytes, another chunk's path, a path outside of the store) -> None.
Damage = Callable[[Path, int, Path, Path], object]

DAMAGES: dict[str, Damage] = {
    "bit in the first page": lambda path, size, other, out: _flip(path, HEAD_BYTES + 7),
    "bit in the middle page": lambda path, size, other, out: _flip(path, HEAD_BYTES + size // 2),
    "bit in the last page": lambda path, size, other, out: _flip(path, HEAD_BYTES + size - 1),
    "bit in the head's length": lambda path, size, other, out: _flip(path, 0),
    "bit in the head's text": lambda path, size, other, out: _flip(path, 60),
    "bit in the head's spaces": lambda path, size, other, out: _flip(path, HEAD_BYTES - 1),
    "bit in the table": lambda path, size, other, out: _flip(path, _table_offset(path, size) + 3),
    "bit behind the table's last entry": lambda path, size, other, out: _flip(path, -1),
    "truncated": lambda path, size, other, out: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path, size, other, out: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path, size, other, out: os.truncate(path, 0),
    "grown": lambda path, size, other, out: os.truncate(path, path.stat().st_size + 4096),
    "all zeros": lambda path, size, other, out: path.write_bytes(bytes(path.stat().st_size)),
    "another chunk's file": lambda path, size, other, out: shutil.copyfile(other, path),
    "a directory": lambda path, size, other, out: _replace_by_directory(path),
    "a link that leaves the store": lambda path, size, other, out: _replace_by_link(path, out),
    "a pipe": lambda path, size, other, out: _replace_by_fifo(path),
}
