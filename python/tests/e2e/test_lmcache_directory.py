"""One directory for kvrail and LMCache, and copies of it, under real vLLM."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    moved,
    step,
)
from prompts import chunks_in, loadable_tokens, reuse_prompts, select

HITS = "vllm:external_prefix_cache_hits_total"
EXPECTED_HITS = loadable_tokens(1500)
CHUNK_TOKENS = 256
PEER = Path(__file__).resolve().parents[1] / "lmcache_directory" / "gds_peer.py"
PEER_SECONDS = 240.0
PROMPTS = select(reuse_prompts(), "first", "second")
METADATA = "*.kvcache.safetensors.metadata"


def ask(environment: dict[str, str], *questions: tuple[str, Any]) -> list[Any]:
    """Asks LMCache, in a process of its own with the hash seed of the engines."""
    done = subprocess.run(
        [sys.executable, str(PEER)],
        input=json.dumps(questions),
        env=environment | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=PEER_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[Any] = json.loads(done.stdout)
    return answers


def in_tree(model: Path, tree: Path, *more: dict[str, Any]) -> Job:
    """An engine that answers the prompts, over LMCache's directory."""
    steps = [step("generate", prompts=PROMPTS), *more]
    return Job(model, steps, tree, settings={"layout": "lmcache"})


def in_store(model: Path, store: Path, *steps: dict[str, Any]) -> Job:
    """An engine over kvrail's own store, with LMCache's hashes for keys."""
    return Job(model, list(steps), store, settings={"chunk_hash": "lmcache"})


@dataclass
class Tree:
    """A directory that kvrail wrote in LMCache's form."""

    path: Path
    running: Running


@pytest.fixture(scope="module")
def tree(
    engines: Engines,
    llama: Path,
    plain: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tree:
    path = tmp_path_factory.mktemp("tree")
    wait = step("wait_for_files", directory=str(path), pattern=METADATA, files=chunks_in(PROMPTS))
    result, running = engines.run(in_tree(llama, path, wait))
    assert_same_answers("cold", plain, result["generate"])
    return Tree(path, running)


def assert_all_hit(what: str, plain: dict[str, Any], answers: dict[str, Any]) -> None:
    assert_same_answers(what, plain, answers)
    for answer in answers.values():
        assert moved(answer, HITS) == EXPECTED_HITS


def chunk_paths(tree: Path, keys: list[str]) -> list[Path]:
    """The files of keys, in their order."""
    from kvrail import _core

    return [tree / _core.lmcache_path(key) for key in keys]


def lmcache_keys(model: Path, tokens: list[int], environment: dict[str, str]) -> list[str]:
    prompt = {
        "model": str(model),
        "world_size": 1,
        "worker_id": 0,
        "dtype": "float32",
        "chunk_size": CHUNK_TOKENS,
        "algorithm": "builtin",
        "tokens": tokens,
    }
    (keys,) = ask(environment, ("keys", prompt))
    return list(keys)


def test_a_restarted_engine_loads_what_it_stored(
    engines: Engines, llama: Path, plain: dict[str, Any], tree: Tree
) -> None:
    result, running = engines.run(in_tree(llama, tree.path))
    assert_all_hit("warm", plain, result["generate"])
    assert_loaded_is_stored([tree.running], [running])


def test_lmcache_finds_the_same_keys_for_the_same_tokens_and_reads_all(
    llama: Path, tree: Tree, lmcache_environment: dict[str, str]
) -> None:
    asked = [lmcache_keys(llama, tokens, lmcache_environment) for tokens in PROMPTS.values()]
    keys = [key for keys in asked for key in keys]
    assert len(keys) == chunks_in(PROMPTS)
    (found,) = ask(lmcache_environment, ("read", str(tree.path)))
    assert sorted(found) == sorted(keys)
    shapes = [answer[1] for answer in found.values()]
    assert shapes == [[2, 4, CHUNK_TOKENS, 128]] * len(keys)


def test_what_lmcache_wrote_is_loaded_and_a_damaged_file_is_a_miss(
    engines: Engines,
    llama: Path,
    plain: dict[str, Any],
    tree: Tree,
    lmcache_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    (count,) = ask(lmcache_environment, ("copy", (str(tree.path), str(tmp_path))))
    assert count == chunks_in(PROMPTS)
    name, damaged_name = PROMPTS
    damaged = chunk_paths(tmp_path, lmcache_keys(llama, PROMPTS[damaged_name], lmcache_environment))
    os.truncate(damaged[1], damaged[1].stat().st_size - 1)
    with damaged[3].open("r+b") as file:
        file.write(bytes(16))
    result, running = engines.run(in_tree(llama, tmp_path))
    answers = result["generate"]
    assert_same_answers("written by LMCache", plain, answers)
    assert moved(answers[name], HITS) == EXPECTED_HITS
    failed = [record for record in running.records("load") if record["failed"]]
    assert len(failed) == 2
    # What was computed in its place was stored again.
    assert damaged[1].stat().st_size == damaged[0].stat().st_size
    assert_loaded_is_stored([tree.running], [running])


def test_a_copy_in_kvrails_own_store_is_loaded(
    engines: Engines, llama: Path, plain: dict[str, Any], tree: Tree, tmp_path: Path
) -> None:
    store = tmp_path / "kv"
    third = select(reuse_prompts(), "third")
    wait = step("wait_for_chunks", directory=str(store), files=chunks_in(third))
    engines.run(in_store(llama, store, step("generate", prompts=third), wait))

    def copied() -> dict[str, Any]:
        done = subprocess.run(
            ["kvrail", "import", str(tree.path), str(store), "--json"],
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    report = copied()
    assert report["imported"] == chunks_in(PROMPTS) and report["already_present"] == 0
    report = copied()
    assert report["imported"] == 0 and report["already_present"] == chunks_in(PROMPTS)
    verified = subprocess.run(["kvrail", "verify", str(store)], check=False, timeout=PEER_SECONDS)
    assert verified.returncode == 0
    steps = [step("generate", prompts=PROMPTS | third)]
    result, running = engines.run(in_store(llama, store, *steps))
    assert_all_hit("copied", plain, result["generate"])
    assert len(running.records("load")) > 0
