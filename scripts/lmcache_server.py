"""LMCache's own server, from its wheel, with kvrail's L2 adapter or one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
STOP_SECONDS = 60.0


def kvrail_adapter(folder: Path, **params: Any) -> dict[str, Any]:
    """The value of `--l2-adapter` for kvrail with its files in `folder`."""
    return {
        "type": "plugin",
        "module_path": "kvrail.lmcache",
        "class_name": "KvrailL2Adapter",
        "adapter_params": {"gds_path": str(folder)} | params,
    }


@dataclass
class Server:
    """A server that runs."""

    port: int
    http_port: int
    log: Path
    process: subprocess.Popen[bytes]

    def forget(self) -> None:
        """Empties L1, so that the next prompt comes from L2."""
        address = f"http://127.0.0.1:{self.http_port}/cache/clear"
        urllib.request.urlopen(urllib.request.Request(address, method="POST"), timeout=30).close()

    def sessions(self) -> int:
        """The requests whose end the server has not been told, or has not got to yet."""
        address = f"http://127.0.0.1:{self.http_port}/status"
        with urllib.request.urlopen(address, timeout=30) as response:
            return int(json.load(response)["active_sessions"])


@contextlib.contextmanager
def serve(
    adapter: Mapping[str, Any], log: Path, environment: Mapping[str, str], l1_gb: float = 1.0
) -> Iterator[Server]:
    """Runs `lmcache server`; ends it as its users do, and waits for what it has to store."""
    port, http_port, metrics_port = free_ports(3)
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--http-port", str(http_port)]
    command += ["--prometheus-port", str(metrics_port), "--l1-size-gb", str(l1_gb)]
    command += ["--chunk-size", "256", "--eviction-policy", "LRU"]
    # On a CPU the engine copies; the server's default expects a GPU.
    command += ["--supported-transfer-mode", "engine_driven"]
    command += ["--l2-adapter", json.dumps(adapter)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, http_port, log)
        yield Server(port, http_port, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that are free, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5).close()
            return
        time.sleep(0.25)
    raise AssertionError(f"lmcache server did not start:\n{log.read_text()[-6000:]}")
