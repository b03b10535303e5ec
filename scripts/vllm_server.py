"""One `vllm serve` process: started, asked, stopped. For the demo, not part of the package."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_LIMIT_SECONDS = 300.0
STOP_LIMIT_SECONDS = 60.0
REQUEST_LIMIT_SECONDS = 300.0
LOG_TAIL_LINES = 40


class ServerError(Exception):
    """The server did not do what was asked of it; the message holds the end of its log."""


@dataclass(frozen=True)
class Answer:
    """What one completion request gave."""

    text: str
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int


def free_port() -> int:
    """Returns a port of the loopback address that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns this process's environment without settings of a cache, and with `extra`.

    A variable such as LMCACHE_CHUNK_SIZE ranks above the YAML file; one that is left over in the
    caller's shell would quietly change what is measured.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LMCACHE_", "KVRAIL_"))
    }
    kept.update(
        # Everything stays on this machine: no hub, no usage report, no other interface.
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_HOST_IP=HOST,
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    kept.update(extra)
    return kept


class VllmServer:
    """A `vllm serve` process in a process group of its own, with its output in a log file."""

    def __init__(
        self, model: Path, options: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Describes the server; nothing runs until it is entered as a context manager."""
        self.port = free_port()
        self.log = log
        program = Path(sys.executable).with_name("vllm")
        address = ["--host", HOST, "--port", str(self.port)]
        self.command = [str(program), "serve", str(model), *options, *address]
        # A process that is killed leaves its sockets behind. Their paths must be short.
        self._sockets = tempfile.TemporaryDirectory(prefix="kvrail-")
        self._environment = clean_environment({"VLLM_RPC_BASE_PATH": self._sockets.name})
        self._environment.update(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def shown_command(self) -> str:
        """Returns the command as a person would type it, without the folder of the program."""
        return shlex.join(["vllm", *self.command[1:]])

    def wait_until_healthy(self, progress: Callable[[], None]) -> None:
        """Waits for the server to answer; calls `progress` a few times a second.

        Raises ServerError when the process ends or the time limit passes.
        """
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while not self._is_healthy():
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"the server ended while it started\n{self.log_tail()}")
            if time.monotonic() > deadline:
                limit = f"{START_LIMIT_SECONDS:.0f} s"
                raise ServerError(f"the server was not ready after {limit}\n{self.log_tail()}")
            progress()
            time.sleep(0.25)

    def ask(self, prompt: str, max_tokens: int, progress: Callable[[], None]) -> Answer:
        """Sends a streaming completion request at temperature 0 and reads its answer to the end."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, prompt_tokens, first_token_seconds = "", 0, None
        start = time.monotonic()
        for event in self._stream("/v1/completions", body):
            progress()
            if event.get("error"):
                raise ServerError(f"the request failed: {event['error']}\n{self.log_tail()}")
            for choice in event.get("choices", []):
                if choice["text"] and first_token_seconds is None:
                    first_token_seconds = time.monotonic() - start
                text += choice["text"]
            prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", prompt_tokens)
        if first_token_seconds is None:
            raise ServerError(f"the answer was empty\n{self.log_tail()}")
        return Answer(text, first_token_seconds, time.monotonic() - start, prompt_tokens)

    def metrics(self) -> dict[str, float]:
        """Reads `/metrics`: the value of each sample by its name and labels as printed."""
        status, body = self._get("/metrics")
        if status != 200:
            raise ServerError(f"`/metrics` answered {status}\n{self.log_tail()}")
        samples = {}
        for line in body.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def stop(self) -> bool:
        """Stops the server and all that it started; tells whether it ended by itself in time."""
        process, self._process = self._process, None
        if process is None:
            return True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_SECONDS)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
        # The engine's processes are in the group too; they must not outlive the server.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._sockets.cleanup()
        return in_time

    def log_tail(self) -> str:
        """Returns the last lines of the server's log, below a line that names the file."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"--- end of {self.log}:", *lines, "---"])

    def _is_healthy(self) -> bool:
        try:
            status, _ = self._get("/health")
        except (OSError, http.client.HTTPException):
            return False
        return status == 200

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _stream(self, path: str, body: Mapping[str, object]) -> Iterator[dict]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_LIMIT_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                message = response.read().decode(errors="replace")
                raise ServerError(f"`{path}` answered {response.status}: {message}")
            for line in response:
                payload = line.strip().removeprefix(b"data: ")
                if payload and payload != b"[DONE]":
                    yield json.loads(payload)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"`{path}`: {error}\n{self.log_tail()}") from error
        finally:
            connection.close()
