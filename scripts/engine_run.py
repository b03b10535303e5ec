"""What benchmarks with a real vLLM share: a process for each run, prompts, places for stores."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from make_model import cache_folder
from vllm_server import clean_environment

RESULT = "kvrail-result: "
LOG_TAIL_LINES = 40
KILL_LIMIT_SECONDS = 10.0


def random_tokens(source: random.Random, count: int, vocabulary_size: int) -> list[int]:
    """Draws tokens, but none from the ends of the vocabulary, where the special ones are."""
    return [source.randrange(100, vocabulary_size - 100) for _ in range(count)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the lowest and the highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_result(result: Any) -> None:
    """Tells the process that started this one what came of the run."""
    print(f"{RESULT}{json.dumps(result)}", flush=True)


def run_apart(
    script: str, arguments: Sequence[str], extra: Mapping[str, str], limit_seconds: float
) -> Any:
    """Runs a script in a process of its own and returns what it gave to `print_result`.

    Raises RuntimeError with the end of its output when it gave nothing.
    """
    # A process that is killed leaves its sockets behind. Their paths must be short.
    with tempfile.TemporaryDirectory(prefix="kvrail-") as sockets:
        child = subprocess.Popen(
            [sys.executable, script, *arguments],
            env=clean_environment({"VLLM_RPC_BASE_PATH": sockets, **extra}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=limit_seconds)
        finally:
            # vLLM starts processes of its own, which would outlive one that is killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(KILL_LIMIT_SECONDS)
    lines = output.splitlines()
    for line in reversed(lines):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    shown = [f"the run ended with {child.returncode}:", *lines[-LOG_TAIL_LINES:]]
    raise RuntimeError("\n".join(shown))


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder in the cache, on the disk rather than in a tmpfs, that is removed at the end."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=cache_folder().absolute()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def chunk_files(store: Path) -> list[Path]:
    """The chunk files that are published in a store's directory, by name."""
    names = (file for file in store.rglob("*.safetensors") if not file.name.startswith("."))
    return sorted(file for file in names if file.parent.name != "quarantine")
