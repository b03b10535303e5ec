"""Starts engines for the tests, waits for them, and compares what they answered."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Where a connector that does nothing is.
SCRIPTS = HERE.parents[2] / "scripts"
JOB_SECONDS = 240.0
FLOAT32_BOUND = 1e-4
MIB = 1 << 20


@dataclass
class Job:
    """One engine and what it shall do."""

    model: Path
    steps: list[dict[str, Any]]
    store: Path | None = None
    """The directory of kvrail; None runs vLLM without it."""
    role: str = "kv_both"
    second_store: Path | None = None
    """The directory of a connector that comes first, both under vLLM's `MultiConnector`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`kv_connector_extra_config`, added to the defaults of these tests."""
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    without_override: bool = False
    """Whether root's right to ignore file modes is given up."""

    def as_json(self, files: Path) -> dict[str, Any]:
        """The job as `engine_job` reads it."""
        engine: dict[str, Any] = {
            "model": str(self.model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4096,
            "max_num_batched_tokens": 512,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "E2E_RECORD": str(files.with_suffix(".record")),
            "E2E_CONTROL": str(files.with_suffix(".control")),
        }
        if self.store is not None:
            environment["E2E_STORE"] = str(self.store)
            # Eight MiB of staging hold seven chunks, so long prompts must stream through it.
            # The models are so small that computing is often quicker than loading.
            settings = {
                "gds_path": str(self.store),
                "gds_buffer_size": 8,
                "min_load_tokens": 0,
            } | self.settings
            engine["kv_transfer_config"] = connector = {
                "kv_connector": "RecordingConnector",
                "kv_connector_module_path": "recording_connector",
                "kv_role": self.role,
                "kv_connector_extra_config": settings,
            }
            if self.second_store is not None:
                first = connector | {
                    "kv_connector": "KvrailConnector",
                    "kv_connector_extra_config": settings | {"gds_path": str(self.second_store)},
                }
                engine["kv_transfer_config"] = {
                    "kv_connector": "MultiConnector",
                    "kv_role": self.role,
                    "kv_connector_extra_config": {"connectors": [first, connector]},
                }
        return {
            "engine": engine | self.engine,
            "environment": environment | self.environment,
            "steps": self.steps,
            "without_override": self.without_override,
        }


@dataclass
class Running:
    """An engine under way."""

    files: Path

    def log(self) -> str:
        """What the engine's processes printed so far."""
        path = self.files.with_suffix(".log")
        return path.read_text(errors="replace") if path.exists() else ""

    def records(self, event: str) -> list[dict[str, Any]]:
        """What the test connector recorded of this kind."""
        path = self.files.with_suffix(".record")
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for line in lines if (record := json.loads(line))["event"] == event]

    def wait(self, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """The result of the steps. Fails with the log when the engine failed or took too long."""
        status = self.exit_status(seconds)
        if status != 0:
            raise AssertionError(f"the engine ended with {status}:\n{self.log()[-6000:]}")
        result: dict[str, Any] = json.loads(self.files.with_suffix(".result").read_text())
        return result

    def exit_status(self, seconds: float = JOB_SECONDS) -> int:
        """The exit status; processes that take longer are killed."""
        path = self.files.with_suffix(".exit")
        deadline = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end after {seconds} s:\n{self.log()[-6000:]}")
            time.sleep(0.05)
        self.kill()
        return os.waitstatus_to_exitcode(int(path.read_text()))

    def kill(self) -> None:
        """Ends what is left of the engine's process group: only processes that it started."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(self.files.with_suffix(".pid").read_text()), signal.SIGKILL)


class Engines:
    """Runs jobs through one `engine_server`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._running: list[Running] = []
        environment = dict(os.environ)
        path = [str(HERE), str(SCRIPTS), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        for name in [name for name in environment if name.startswith(("LMCACHE_", "KVRAIL_"))]:
            del environment[name]
        # LMCache's hashes start from Python's hash of this number, which only a process that starts
        # with it has.
        environment["PYTHONHASHSEED"] = "0"
        with (folder / "server.log").open("w") as log:
            self._server = subprocess.Popen(
                [sys.executable, str(HERE / "engine_server.py")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def start(self, job: Job) -> Running:
        """Starts a job; several may run at the same time."""
        self._count += 1
        files = self._folder / f"engine{self._count}.json"
        files.write_text(json.dumps(job.as_json(files)))
        running = Running(files)
        assert self._server.stdin is not None
        self._server.stdin.write(f"{files}\n")
        self._server.stdin.flush()
        self._running.append(running)
        return running

    def run(self, job: Job, seconds: float = JOB_SECONDS) -> tuple[dict[str, Any], Running]:
        """Runs a job to its end."""
        running = self.start(job)
        return running.wait(seconds), running

    def close(self) -> None:
        """Ends the server and every engine that is still there."""
        for running in self._running:
            if not running.files.with_suffix(".exit").exists():
                running.kill()
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()


def step(do: str, name: str | None = None, **arguments: Any) -> dict[str, Any]:
    """One step of a job; `name` is what its result is called."""
    return {"do": do, "name": name or do, "with": arguments}


def difference(expected: dict[str, Any], actual: dict[str, Any], bound: float) -> float:
    """The largest difference of log-probabilities of two answers with the same tokens.

    Where the tokens part, they must be as likely as each other within `bound`: a tie that rounding
    decides. What follows a tie cannot be compared.
    """
    largest = 0.0
    pairs = zip(
        expected["tokens"], actual["tokens"], expected["logprobs"], actual["logprobs"], strict=True
    )
    for position, (token, other, ours, theirs) in enumerate(pairs):
        common = ours.keys() & theirs.keys()
        assert len(common) >= len(ours) // 2, f"position {position}: other tokens are likely"
        largest = max(largest, *(abs(ours[name] - theirs[name]) for name in common))
        if token != other:
            both = {str(token), str(other)}
            assert both <= common, f"position {position}: token {other} instead of {token}"
            gap = max(abs(side[str(token)] - side[str(other)]) for side in (ours, theirs))
            assert gap <= bound, f"position {position}: token {other} instead of {token}, {gap=}"
            break
    return largest


def assert_same_answers(
    what: str,
    expected: dict[str, Any],
    actual: dict[str, Any],
    bound: float = FLOAT32_BOUND,
) -> float:
    """Asserts that `actual` answers each of its prompts as `expected` does; prints how closely."""
    largest = 0.0
    for name, answer in actual.items():
        found = difference(expected[name], answer, bound)
        print(f"{what}: {name}: largest difference of log-probabilities {found:.2e}")
        assert found <= bound, f"{what}: {name}: {found} > {bound}"
        largest = max(largest, found)
    return largest


def assert_loaded_is_stored(stored: list[Running], loaded: list[Running]) -> int:
    """Asserts that every block loaded has the bytes it was stored with; returns their number.

    A chunk that was lost and computed again was stored with others: float32 sums depend on how a
    prompt was cut into steps.
    """

    def place(record: dict[str, Any]) -> tuple[int, str, str]:
        return record["group"], str(record["rank"]), record["key"]

    known: dict[tuple[int, str, str], list[list[str]]] = {}
    for running in stored:
        for record in running.records("store"):
            known.setdefault(place(record), []).append(record["blocks"])
    count = 0
    for running in loaded:
        for record in running.records("load"):
            if record["failed"]:
                continue
            originals = [blocks[record["first_block"] :] for blocks in known[place(record)]]
            assert record["blocks"] in originals, f"chunk {record['key']}: other bytes than stored"
            count += len(record["blocks"])
    return count


def chunk_keys(
    running: Running, tokens: list[int], salt: str | None = None, blocks: int = 2
) -> list[str]:
    """The chunk keys of a prompt that the engine was asked, from vLLM's own block hashes.

    A chunk's key is the hash of the last of its blocks.
    """
    prompt = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    for record in running.records("request"):
        if record["prompt"] == prompt and record["salt"] == salt:
            keys: list[str] = record["hashes"][blocks - 1 :: blocks]
            return keys
    raise AssertionError("the engine never saw this prompt")


def chunk_path(store: Path, key: str, rank: int = 0, group: int = 0) -> Path:
    """Where the chunk with this key lies: the file of a rank, all of which are there."""
    paths = sorted(store.glob(f"*/g{group}r*/*/{key}.safetensors"))
    assert len(paths) > rank, f"chunk {key} of group {group}, rank {rank}: {paths}"
    return paths[rank]


def moved(answer: dict[str, Any], name: str) -> float:
    """How much the counters whose name begins with `name` moved during this answer."""
    changes: dict[str, float] = answer["moved"]
    return sum(change for key, change in changes.items() if key.startswith(name))
