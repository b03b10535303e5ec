"""The udev record of a file system's device, for machines that have none.

cuFile takes no file without one, not even in its compatible mode (5027): it learns the file
system's type from there. Containers and small virtual machines run no udev.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RecordError(Exception):
    """There is no record, and none can be made."""


@contextmanager
def records(directories: list[Path], root: Path = Path("/")) -> Iterator[list[Path]]:
    """Writes the records that the devices below ``directories`` lack; removes them at the end.

    Yields their paths, relative to ``root``. Raises ``RecordError`` where that cannot be.
    """
    written: list[Path] = []
    try:
        for directory in directories:
            path = _write(directory, root)
            if path is not None:
                written.append(path)
        yield [path.relative_to(root) for path in written]
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def _write(directory: Path, root: Path) -> Path | None:
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    record = root / "run/udev/data" / f"b{number}"
    if record.exists():
        return None
    mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    # "ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELDS] - TYPE SOURCE OPTIONS", as proc(5) says.
    types = [line.split(" - ", 1)[1].split()[0] for line in mounts if line.split()[2] == number]
    if os.major(device) == 0 or not types:
        raise RecordError(f"{directory} lies on no block device of its own ({number})")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"E:ID_FS_TYPE={types[0]}\nE:ID_FS_USAGE=filesystem\n", encoding="utf-8")
    except OSError as error:
        raise RecordError(f"write the udev record of {directory}: {error}") from error
    return record
