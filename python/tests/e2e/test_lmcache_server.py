"""vLLM behind LMCache's own server, which keeps its objects in kvrail's files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import assert_same_answers
from prompts import main_prompts

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts"))
from lmcache_server import Server, kvrail_adapter, serve

ENGINE = Path(__file__).with_name("lmcache_engine.py")
ENGINE_SECONDS = 240.0


def run_engine(
    model: Path,
    server: Server,
    prompts: dict[str, list[int]],
    folder: Path,
    environment: dict[str, str],
) -> dict[str, Any]:
    """The answers of a vLLM of its own process to `prompts`."""
    job, result = folder / "engine.json", folder / "engine.result"
    result.unlink(missing_ok=True)
    described = {"model": str(model), "port": server.port, "prompts": prompts, "rounds": 1}
    job.write_text(json.dumps(described | {"settle": 3, "result": str(result)}))
    with (folder / "engine.log").open("w") as log:
        subprocess.run(
            [sys.executable, str(ENGINE), str(job)],
            env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=ENGINE_SECONDS,
        )
    assert result.exists(), (folder / "engine.log").read_text()[-6000:]
    (answers,) = json.loads(result.read_text())
    return dict(answers)


def chunk_files(store: Path) -> list[Path]:
    return sorted(store.glob("*/g*r*/*/*.safetensors"))


def full_chunks(prompt: list[int]) -> int:
    return len(prompt) // 256


@pytest.mark.timeout(900)
def test_answers_are_the_same_from_files_after_both_were_restarted(
    llama: Path, tmp_path: Path, lmcache_environment: dict[str, str]
) -> None:
    store = tmp_path / "kv"
    prompt = main_prompts()["long"]
    prompts = {"long": prompt}
    chunks = full_chunks(prompt)

    def answers(adapter: dict[str, Any], name: str) -> dict[str, Any]:
        log = tmp_path / f"{name}.log"
        with serve(adapter, log, lmcache_environment) as server:
            found = run_engine(llama, server, prompts, tmp_path, lmcache_environment)
        print(f"{name}: {found['long']['cached']} tokens of {len(prompt)} from the cache")
        assert "Traceback" not in log.read_text(), log.read_text()[-6000:]
        return found

    cold = answers(kvrail_adapter(store), "cold")
    assert cold["long"]["cached"] == 0
    assert len(chunk_files(store)) == chunks

    warm = answers(kvrail_adapter(store), "warm")
    assert warm["long"]["cached"] == chunks * 256
    assert_same_answers("from kvrail's files", cold, warm)

    # One damaged file in the middle: what is before it is used, the rest is computed.
    bad = chunk_files(store)[chunks // 2]
    with bad.open("r+b") as file:
        file.seek(bad.stat().st_size // 2)
        file.write(b"\xff" * 64)
    damaged = answers(kvrail_adapter(store), "damaged")
    assert damaged["long"]["cached"] < chunks * 256
    assert_same_answers("one file damaged", cold, damaged)
    assert list(store.glob("*/quarantine/*.safetensors"))
    # What was computed anew was stored anew.
    assert len(chunk_files(store)) == chunks

    # A directory with no room: everything is computed, and nothing fails.
    full = tmp_path / "full"
    limited = answers(kvrail_adapter(full, max_size=4096), "full")
    assert limited["long"]["cached"] == 0
    assert_same_answers("no room", cold, limited)
    assert chunk_files(full) == []


@pytest.mark.timeout(600)
def test_bytes_that_are_not_verified_show(
    llama: Path, tmp_path: Path, lmcache_environment: dict[str, str]
) -> None:
    """The control: LMCache's own `fs` adapter loads a damaged file, and the answer changes."""
    folder = tmp_path / "fs"
    prompts = {"long": main_prompts()["long"]}
    found = []
    for name in ("cold", "damaged"):
        adapter = {"type": "fs", "base_path": str(folder)}
        with serve(adapter, tmp_path / f"{name}.log", lmcache_environment) as server:
            answer = run_engine(llama, server, prompts, tmp_path, lmcache_environment)
        found.append(answer)
        for path in folder.glob("*.data"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            path.write_bytes(bytes(data))
    assert found[1]["long"]["cached"] > 0
    with pytest.raises(AssertionError):
        assert_same_answers("damaged and not verified", found[0], found[1])
    shutil.rmtree(folder)
