"""A process ends although a thread of its store hangs in the kernel: how far it gets, and when."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
from faulty_mount import CannotMountError, FaultyMount

CLOSE_LIMIT_SECONDS = 2.0
# What the janitor's end, a busy machine and the interpreter's own end add.
SLACK_SECONDS = 3.0


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[FaultyMount]:
    try:
        mounted = FaultyMount(tmp_path, seed=4)
    except CannotMountError as error:
        pytest.skip(f"cannot mount a faulty file system: {error}")
    yield mounted
    mounted.unmount()


class HangingProcess:
    """The process, and what it says."""

    def __init__(self, path: Path, operation: str) -> None:
        script = str(Path(__file__).with_name("hanging_process.py"))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, script, str(path), operation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def line(self, limit_seconds: float) -> list[str]:
        """The next thing that it says."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(limit_seconds), "it said nothing"
        text = bytearray()
        while not text.endswith(b"\n"):
            part = os.read(self.process.stdout.fileno(), 1)
            assert part, "it ended"
            text += part
        return text.decode().split()

    def states(self) -> list[str]:
        """The state of each of its threads, as the kernel names them: Z, D, S."""
        states = []
        for status in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            states.append(status.read_text().rpartition(")")[2].split()[0])
        return sorted(states)


@pytest.mark.parametrize(
    ("operation", "rule"),
    [
        ("load", "read *.safetensors hang"),
        ("lookup", "lookup,getattr,opendir *-* hang"),
        ("store", "write,create *-* hang"),
    ],
)
def test_a_process_with_a_thread_in_the_kernel_comes_to_its_end(
    mounted: FaultyMount, operation: str, rule: str
) -> None:
    hanging = HangingProcess(mounted.path, operation)
    try:
        ready, port = hanging.line(60.0)
        assert ready == "ready"
        mounted.set(rule)
        hanging.go_on()
        at: dict[str, float] = {}
        while "atexit" not in at:
            what, seconds = hanging.line(CLOSE_LIMIT_SECONDS + SLACK_SECONDS)
            at[what] = float(seconds)
        closing = at["closed"] - at["close"]
        print(f"{operation}: closed in {closing:.2f} s, at the end {at['atexit']:.2f} s after all")
        assert mounted.hits() > 0, "nothing hung"
        # Only a store is waited for; loads and lookups are nobody's loss.
        assert ("given-up" in at) == (operation == "store")
        assert closing <= CLOSE_LIMIT_SECONDS + SLACK_SECONDS
        assert at["atexit"] - at["closed"] <= SLACK_SECONDS
        # All its threads end but the one in the kernel, which keeps the process's entry. SIGKILL
        # would change nothing.
        time.sleep(1.0)
        assert hanging.process.poll() is None, "the kernel let go of a request that is under way"
        print(f"{operation}: threads a second later: {hanging.states()}")
        assert hanging.states().count("D") >= 1
        hanging.process.kill()
        time.sleep(0.2)
        assert hanging.process.poll() is None
        # The thread in the kernel holds what the process had open, too: its port is not free yet.
        socket.create_connection(("127.0.0.1", int(port)), 5.0).close()
        # What ends it: the file system answers, or is taken away.
        start = time.monotonic()
        mounted.unmount()
        hanging.process.wait(10.0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 5.0)
        print(f"{operation}: gone {time.monotonic() - start:.2f} s after the mount was")
    finally:
        mounted.unmount()
        hanging.process.kill()
        hanging.process.wait()
