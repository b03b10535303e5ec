"""Jobs for a second Python process with a store of its own: JSON lines in, JSON lines out.

Run as a script it does one job per line until its input ends; ``StoreProcess`` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from store_harness import Geometry, HostMemory, load_chunks, lookup, open_store, store_chunks


class StoreProcess:
    """A process with one open store; ended with the ``with`` block."""

    def __init__(self, path: Path | str, *, seed: int, prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, __file__, str(path), str(seed)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def do(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Has the process do one job and returns its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process ended without an answer; its error is above"
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_job(job: Mapping[str, Any], *, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Does one job in a process that is started for it with ``prefix`` before its command."""
    with StoreProcess(job["path"], seed=job["seed"], prefix=prefix) as process:
        return process.do(job)


def _answer(path: str, seed: int) -> None:
    memory = HostMemory(Geometry(), seed)
    with open_store(path) as store:
        kv_cache = memory.attach(store)
        for line in sys.stdin:
            job = json.loads(line)
            chunks = {int(index): blocks for index, blocks in job.get("chunks", {}).items()}
            answer: dict[str, Any] = {}
            if job["action"] == "store":
                answer["stored"] = store_chunks(kv_cache, chunks).stored
            elif job["action"] == "lookup":
                answer["found"] = lookup(store, job["indices"])
            else:
                report = load_chunks(kv_cache, chunks)
                answer["loaded"], answer["failed"] = report.loaded, report.failed
            answer["blocks"] = {index: memory.blocks(chunks[index]).hex() for index in chunks}
            answer["metrics"] = store.metrics()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _answer(sys.argv[1], int(sys.argv[2]))
