"""Several ranks: tensor parallel and pipeline parallel in real processes, one of which has trouble.

The directory is a file system that fails as a script says. Three engines use it, one after the
other: the first stores and has a worker killed meanwhile, the second meets what one rank lost, and
has a worker killed while it loads, the third finds all of it whole again.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, payload_bytes
from faulty_mount import CannotMountError, FaultyMount
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    chunk_keys,
    chunk_path,
    moved,
    step,
)
from prompts import CHUNK_TOKENS, loadable_tokens, random_prompt

SEED = 6
# Longer than a healthy load takes beside two ranks that spin on both cores of a busy machine.
WAIT_LIMIT = 15.0
SETTINGS = {"wait_limit_seconds": WAIT_LIMIT, "lookup_limit_seconds": WAIT_LIMIT}
# The wait for the load, what the watch adds to it, and what scheduling on two busy cores may.
WAIT_BOUND = WAIT_LIMIT + 0.1 + 5.0
RANKS = (0, 1)
PARALLEL: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    # vLLM's CPU worker allocates what a later stage receives only while it warms a model up, and
    # it warms up none that it does not compile.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}
# Without this vLLM asks for a NUMA node for each rank.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

LENGTH = 600
TOKENS = 4
CHUNKS = LENGTH // CHUNK_TOKENS
NAMES = ("whole", "lost", "first lost", "damaged", "vanished", "slow", "hanging", "dies loading")
STORED = {name: random_prompt(f"parallel {name}", LENGTH) for name in NAMES}
DIES = {"dies storing": random_prompt("parallel dies storing", LENGTH)}
# Chunks of each prompt that the second engine finds on all ranks.
FOUND = dict.fromkeys(NAMES, CHUNKS) | {"lost": 1, "first lost": 0}


@dataclass
class Directory:
    """What lies in the directory when an engine has ended."""

    verified: dict[str, Any]
    temporary: set[str]
    """Names of files under way."""
    others: list[str]
    """Files in a rank's folder that are no chunks."""


@dataclass
class Met:
    """What three engines answered and left."""

    cold: dict[str, Any]
    warm: dict[str, Any]
    again: dict[str, Any]
    deaths: dict[str, Any]
    directories: list[Directory]
    counters: dict[str, float]
    payload_bytes: int
    """Bytes of one chunk over all ranks."""
    engines: list[Running]


def _look(store: Path) -> Directory:
    ended = subprocess.run(
        ["kvrail", "verify", "--json", str(store)], capture_output=True, text=True, check=False
    )
    assert ended.stdout, ended.stderr
    return Directory(
        json.loads(ended.stdout),
        {path.name for path in store.glob("*/tmp/.*")},
        [
            str(path)
            for path in store.glob("*/g*r*/**/*")
            if path.is_file() and path.suffix != ".safetensors"
        ],
    )


def _of_second_rank(fault: str) -> str:
    """Rules for its files: those of the second head, or of the second stage."""
    return "\n".join(f"read *{folder}/*.safetensors {fault}" for folder in ("r0h1-2", "r1h0-2"))


def _store_and_die(mount: FaultyMount, control: Path) -> list[dict[str, Any]]:
    return [
        step("generate", "cold", prompts=STORED, max_tokens=TOKENS, together=True),
        step("wait_for_chunks", directory=str(mount.source), files=2 * CHUNKS * len(STORED)),
        # What is written when a rank dies is under way for a while.
        step("make_file", path=str(mount.control), text="write *.chunk* delay=500ms"),
        step("make_file", path=str(control), text="kill store 1"),
        step("die", prompt=DIES["dies storing"]),
    ]


def _meet_and_die(mount: FaultyMount, control: Path) -> list[dict[str, Any]]:
    def ask(*names: str, label: str) -> dict[str, Any]:
        prompts = {name: tokens for name, tokens in (STORED | DIES).items() if name in names}
        return step("generate", label, prompts=prompts, max_tokens=TOKENS)

    def fail(rules: str) -> dict[str, Any]:
        return step("make_file", path=str(mount.control), text=rules)

    return [
        ask("whole", label="whole"),
        # Counters travel with engine steps.
        step("pause", seconds=0.5),
        step("generate", "later", prompts={"x": [1, 2, 3]}, max_tokens=1),
        step("metrics"),
        ask("lost", "first lost", "damaged", *DIES, label="lost"),
        step("make_file", path=str(control), text="delete 1"),
        ask("vanished", label="vanished"),
        step("make_file", path=str(control), text=""),
        fail(_of_second_rank("delay=100ms")),
        ask("slow", label="slow"),
        fail(_of_second_rank("hang")),
        ask("hanging", label="hanging"),
        fail(""),
        step("wait_for_hit", "back", prompt=STORED["whole"]),
        step("pause", seconds=1.0),
        step("make_file", path=str(control), text="kill load 1"),
        step("die", prompt=STORED["dies loading"]),
    ]


@pytest.fixture(scope="module")
def right(engines: Engines, llama: Path) -> dict[str, Any]:
    """The answers of one rank without kvrail."""
    result, _ = engines.run(
        Job(llama, [step("generate", prompts=STORED | DIES, max_tokens=TOKENS, together=True)])
    )
    answers: dict[str, Any] = result["generate"]
    return answers


@pytest.fixture(scope="module", params=PARALLEL)
def met(
    request: pytest.FixtureRequest, engines: Engines, llama: Path, tmp_path_factory: Any
) -> Iterator[Met]:
    """Runs the three engines on one directory."""
    folder = tmp_path_factory.mktemp("parallel")
    try:
        mount = FaultyMount(folder, SEED)
    except CannotMountError as error:
        pytest.skip(f"cannot mount a faulty file system: {error}")
    control = folder / "e2e-control"
    job = Job(
        llama,
        _store_and_die(mount, control),
        mount.path,
        settings=SETTINGS,
        engine=PARALLEL[request.param],
        environment=CORES | {"E2E_CONTROL": str(control)},
    )
    try:
        first, writer = engines.run(job)
        mount.set("")
        directories = [_look(mount.source)]
        for name, rank, index in (("lost", 1, 1), ("first lost", 0, 0)):
            chunk_path(mount.source, chunk_keys(writer, STORED[name])[index], rank).unlink()
        bad = chunk_keys(writer, STORED["damaged"])[1]
        DAMAGES["bit in middle page"].apply(chunk_path(mount.source, bad, 1), Path())
        whole = chunk_keys(writer, STORED["whole"])[0]
        payload = sum(payload_bytes(chunk_path(mount.source, whole, rank)) for rank in RANKS)
        control.unlink()
        job.steps = _meet_and_die(mount, control)
        second, reader = engines.run(job)
        directories.append(_look(mount.source))
        control.unlink()
        job.steps = [
            step("generate", prompts=STORED | DIES, max_tokens=TOKENS, together=True),
            step("wait_for_chunks", directory=str(mount.source), files=2 * CHUNKS * len(FOUND)),
        ]
        third, last = engines.run(job)
        directories.append(_look(mount.source))
    finally:
        mount.unmount()
    for result in (first, second, third):
        print(f"{request.param}: an engine started in {result['start_seconds']:.1f} s")
    labels = ("whole", "lost", "vanished", "slow", "hanging")
    yield Met(
        first["cold"],
        {name: answer for label in labels for name, answer in second[label].items()},
        third["generate"],
        {"store": first["die"], "load": second["die"]},
        directories,
        second["metrics"],
        payload,
        [writer, reader, last],
    )


def test_answers_are_those_of_one_rank(met: Met, right: dict[str, Any]) -> None:
    assert_same_answers("cold", right, met.cold)
    assert_same_answers("warm, with trouble", right, met.warm)
    assert_same_answers("after both deaths", right, met.again)
    answers = [*met.cold.values(), *met.warm.values(), *met.again.values()]
    assert {answer["finish_reason"] for answer in answers} == {"length"}


def test_both_ranks_load_their_part_of_a_hit(met: Met) -> None:
    keys = set(chunk_keys(met.engines[0], STORED["whole"])[:CHUNKS])
    for rank in RANKS:
        loads = [r for r in met.engines[1].records("load") if r["number"] == rank]
        assert keys <= {record["key"] for record in loads if not record["failed"]}
    assert met.counters["kvrail:bytes_loaded_total"] == CHUNKS * met.payload_bytes
    blocks = assert_loaded_is_stored(met.engines[:2], met.engines[1:])
    print(f"compared the bytes of {blocks} blocks")


@pytest.mark.parametrize("name", NAMES[:-1])
def test_what_one_rank_lost_is_a_miss_for_all(met: Met, name: str) -> None:
    keys = chunk_keys(met.engines[0], STORED[name])[:CHUNKS]
    tried = {rank: set() for rank in RANKS}  # type: dict[int, set[str]]
    for record in met.engines[1].records("load"):
        tried[record["number"]].add(record["key"])
    for rank in RANKS:
        assert tried[rank] & set(keys) == set(keys[: FOUND[name]])


@pytest.mark.parametrize(("name", "chunk"), [("damaged", 1), ("vanished", 1)])
def test_what_one_rank_cannot_load_is_computed(met: Met, name: str, chunk: int) -> None:
    key = chunk_keys(met.engines[0], STORED[name])[chunk]
    records = [r for r in met.engines[1].records("load") if r["key"] == key]
    assert {r["number"]: r["failed"] for r in records} == {0: False, 1: True}
    assert moved(met.warm[name], "kvrail:loads_failed_total") == 1


def test_a_slow_rank_is_waited_for_and_a_hanging_one_not_for_long(met: Met) -> None:
    keys = set(chunk_keys(met.engines[0], STORED["slow"])[:CHUNKS])
    loads = [record for record in met.engines[1].records("load") if record["key"] in keys]
    assert len(loads) == 2 * CHUNKS and not any(record["failed"] for record in loads)
    keys = set(chunk_keys(met.engines[0], STORED["hanging"])[:CHUNKS])
    loads = [record for record in met.engines[1].records("load") if record["key"] in keys]
    assert {(record["number"], record["failed"]) for record in loads} == {(0, False), (1, True)}
    compute = met.warm["first lost"]["seconds"]
    for name in ("slow", "hanging"):
        waited = met.warm[name]["seconds"] - compute
        print(f"{name}: answered in {met.warm[name]['seconds']:.2f} s")
        assert waited <= WAIT_BOUND, f"{name} waited {waited:.2f} s"


@pytest.mark.parametrize("operation", ["store", "load"])
def test_vllm_says_that_a_rank_died(met: Met, operation: str) -> None:
    death = met.deaths[operation]
    print(f"killed in a {operation}: vLLM said so after {death['seconds']:.1f} s")
    assert death["seconds"] < 30.0
    assert "EngineCore encountered an issue" in death["error"]


def test_the_directory_stays_valid(met: Met) -> None:
    for directory in met.directories:
        print(directory.verified)
        assert directory.verified["checked"] > 0
        assert not directory.verified["damaged"]
        assert not directory.others
    killed = {r["process"] for r in met.engines[0].records("store") if r["number"] == 1}
    assert len(killed) == 1
    process = killed.pop()
    left = {name for name in met.directories[0].temporary if f".{process}." in name}
    assert left, "nothing was under way when the rank was killed"
    assert not left & met.directories[1].temporary, "the next engine leaves it there"


def test_a_restarted_vllm_finds_what_all_ranks_have(met: Met) -> None:
    # That of which one rank had published its part when the other was killed is whole by now, too.
    for name, answer in met.again.items():
        assert answer["cached_tokens"] == loadable_tokens(LENGTH), name
