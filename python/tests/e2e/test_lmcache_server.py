"""vLLM behind LMCache's own server, which keeps its objects in kvrail's files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faulty_mount import CannotMountError, FaultyMount
from harness import assert_same_answers
from prompts import random_prompt

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts"))
from lmcache_server import Server, kvrail_adapter, serve

ENGINE = Path(__file__).with_name("lmcache_engine.py")
ANSWER_SECONDS = 240.0
STORE_SECONDS = 30.0
CHUNK_TOKENS = 256
PROMPTS = {name: random_prompt(f"server {name}", 3500) for name in ("long", "full", "hanging")}
CHUNKS = 3500 // CHUNK_TOKENS
WAIT_LIMIT = 2.0
LOOKUP_LIMIT = 1.0
# The lookup of LMCache's server asks its adapter, and asks it again where it loads.
HANG_BOUND = 2 * (LOOKUP_LIMIT + WAIT_LIMIT)
SLACK = 2.0


@dataclass
class Engine:
    """An engine in a process of its own, and the server that it uses."""

    server: Server
    process: subprocess.Popen[str]
    result: Path
    log: Path

    def ask(self, *names: str) -> dict[str, Any]:
        """The answers to prompts that the server has not in its own memory."""
        self.server.forget()
        self.result.unlink(missing_ok=True)
        assert self.process.stdin is not None
        print(json.dumps({name: PROMPTS[name] for name in names}), file=self.process.stdin)
        self.process.stdin.flush()
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self.result.exists():
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            assert time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.02)
        answers: dict[str, Any] = json.loads(self.result.read_text())
        for name, answer in answers.items():
            print(f"{name}: {answer['cached']} tokens from the cache, {answer['seconds']:.2f} s")
        return answers


@contextlib.contextmanager
def running(
    model: Path, adapter: dict[str, Any], folder: Path, environment: dict[str, str]
) -> Iterator[Engine]:
    """Starts a server with this L2 adapter and an engine; ends both."""
    folder.mkdir()
    job, result, log = folder / "engine.json", folder / "result.json", folder / "engine.log"
    server_log = folder / "server.log"
    with serve(adapter, server_log, environment) as server, log.open("w") as output:
        job.write_text(
            json.dumps({"model": str(model), "port": server.port, "result": str(result)})
        )
        process = subprocess.Popen(
            [sys.executable, str(ENGINE), str(job)],
            env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield Engine(server, process, result, log)
            # The server gets to a request's end after the engine has answered, and raises where
            # the engine has said goodbye before that.
            wait_for(lambda: server.sessions() == 0, "the server's end of every request")
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in server_log.read_text(), server_log.read_text()[-6000:]


def wait_for(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STORE_SECONDS
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def chunk_files(store: Path) -> list[Path]:
    return sorted(store.glob("*/g*r*/*/*.safetensors"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[FaultyMount]:
    """A mount that fails as it is told, healthy."""
    try:
        mounted = FaultyMount(tmp_path, seed=5)
    except CannotMountError as error:
        pytest.skip(f"cannot mount a faulty file system: {error}")
    yield mounted
    mounted.unmount()


@pytest.mark.timeout(900)
def test_answers_are_the_same_from_files_after_both_were_restarted(
    llama: Path, tmp_path: Path, lmcache_environment: dict[str, str], mounted: FaultyMount
) -> None:
    store = mounted.source
    limits = {"wait_limit_seconds": WAIT_LIMIT, "lookup_limit_seconds": LOOKUP_LIMIT}
    adapter = kvrail_adapter(mounted.path, extra_config=limits)

    with running(llama, adapter, tmp_path / "cold", lmcache_environment) as engine:
        cold = engine.ask("long")
        wait_for(lambda: len(chunk_files(store)) == CHUNKS, "the files of one prompt")
        kept = chunk_files(store)
        cold |= engine.ask("full", "hanging")
        wait_for(lambda: len(chunk_files(store)) == len(PROMPTS) * CHUNKS, "the files of all")
    assert all(answer["cached"] == 0 for answer in cold.values())
    # Those two are new to the next server.
    for path in set(chunk_files(store)) - set(kept):
        path.unlink()

    with running(llama, adapter, tmp_path / "warm", lmcache_environment) as engine:
        warm = engine.ask("long")
        assert warm["long"]["cached"] == CHUNKS * CHUNK_TOKENS
        assert_same_answers("from kvrail's files", cold, warm)

        # One damaged file in the middle: what is before it is used, the rest is computed.
        bad = kept[CHUNKS // 2]
        with bad.open("r+b") as file:
            file.seek(bad.stat().st_size // 2)
            file.write(b"\xff" * 64)
        damaged = engine.ask("long")
        assert damaged["long"]["cached"] < CHUNKS * CHUNK_TOKENS
        assert_same_answers("one file damaged", cold, damaged)
        assert list(store.glob("*/quarantine/*.safetensors"))
        # What was computed anew is stored anew.
        wait_for(lambda: len(chunk_files(store)) == CHUNKS, "the damaged file, anew")

        # A full disk: what is there is loaded, what is new is computed, and nothing fails.
        mounted.set("write,create,mkdir *-* error=ENOSPC")
        full = engine.ask("full", "long")
        assert full["full"]["cached"] == 0
        assert full["long"]["cached"] == CHUNKS * CHUNK_TOKENS
        assert_same_answers("a full disk", cold, full)
        wait_for(lambda: mounted.hits() > 0, "a store that finds the disk full")
        assert chunk_files(store) == kept

        # A mount that hangs: all is computed, after a wait that is bounded.
        mounted.set("* *-* hang")
        hanging = engine.ask("long", "hanging")
        assert all(answer["cached"] == 0 for answer in hanging.values())
        assert_same_answers("a mount that hangs", cold, hanging)
        compute = min(answer["seconds"] for answer in cold.values())
        waited = max(answer["seconds"] for answer in hanging.values()) - compute
        print(f"waited {waited:.2f} s beyond {compute:.2f} s of computing, bound {HANG_BOUND} s")
        assert waited < HANG_BOUND + SLACK
        mounted.set("")

        deadline = time.monotonic() + STORE_SECONDS
        while (back := engine.ask("long"))["long"]["cached"] != CHUNKS * CHUNK_TOKENS:
            assert time.monotonic() < deadline, "the mount is not used again"
        assert_same_answers("the mount is well again", cold, back)


@pytest.mark.timeout(600)
def test_bytes_that_are_not_verified_show(
    llama: Path, tmp_path: Path, lmcache_environment: dict[str, str]
) -> None:
    """The control: LMCache's own `fs` adapter loads a damaged file, and the answer changes."""
    store = tmp_path / "fs"
    adapter = {"type": "fs", "base_path": str(store)}
    with running(llama, adapter, tmp_path / "control", lmcache_environment) as engine:
        cold = engine.ask("long")
        wait_for(lambda: len(list(store.glob("*.data"))) == CHUNKS, "the files of one prompt")
        for path in store.glob("*.data"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            path.write_bytes(bytes(data))
        damaged = engine.ask("long")
    assert damaged["long"]["cached"] > 0
    with pytest.raises(AssertionError):
        assert_same_answers("damaged and not verified", cold, damaged)
