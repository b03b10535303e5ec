"""Where cuFile is looked for, and the program that tries it: ``python -m kvrail.cufile``.

Opening cuFile's driver can spin for ever, so a store has it done in a process of its own first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvrail._core import answer_cufile_probe, direct_path_problem

# The wheels have only the first name.
_NAMES = ("libcufile.so.0", "libcufile.so")


def libraries(
    environment: Mapping[str, str] | None = None, search: Iterable[str] | None = None
) -> list[str]:
    """Where libcufile is looked for, in order.

    ``KVRAIL_CUFILE_LIBRARY`` alone where it is set; else the system's search, then the wheels
    (``nvidia-cufile-cu12`` puts it into ``nvidia/cufile/lib``, ``nvidia-cufile`` into
    ``nvidia/cu13/lib``) in the folders of ``search``, ``sys.path`` unless given.
    """
    environment = os.environ if environment is None else environment
    chosen = environment.get("KVRAIL_CUFILE_LIBRARY")
    if chosen:
        return [chosen]
    folders = [Path(folder) for folder in (sys.path if search is None else search) if folder]
    pattern = f"nvidia/*/lib/{_NAMES[0]}"
    wheels = [str(path) for folder in folders for path in sorted(folder.glob(pattern))]
    return [*_NAMES, *dict.fromkeys(wheels)]


def store_options(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The arguments of ``Store`` that have to do with GPUs."""
    environment = os.environ if environment is None else environment
    return {
        "cuda_library": environment.get("KVRAIL_CUDA_LIBRARY") or None,
        "cufile_libraries": libraries(environment),
        "cufile_probe": [sys.executable, "-m", "kvrail.cufile"],
    }


def path_problems(directories: Iterable[str], system_root: str | None = None) -> dict[str, str]:
    """Why there is no direct path, for each of ``directories`` without one; none need exist yet."""
    problems = {}
    for directory in directories:
        existing = Path(directory)
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        problem = direct_path_problem(existing, system_root=system_root)
        if problem is not None:
            problems[directory] = problem
    return problems


if __name__ == "__main__":
    answer_cufile_probe()
