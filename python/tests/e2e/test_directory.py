"""A directory that cannot be written, or is full: vLLM serves on and says so once."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    MIB,
    Engines,
    Job,
    Running,
    assert_loaded_is_stored,
    assert_same_answers,
    moved,
    step,
)
from prompts import chunks_in, directory_prompts, loadable_tokens, select

READ_ONLY = 0o500
WRITABLE = 0o700


def _warnings(running: Running) -> list[str]:
    """kvrail's warnings in an engine's log, which the tests also print."""
    lines = [line for line in running.log().splitlines() if "kvrail" in line]
    warnings = [line for line in lines if " WARNING " in line or " ERROR " in line]
    for line in warnings:
        print(line)
    return warnings


def _everything(store: Path) -> set[Path]:
    files = {path for path in store.rglob("*") if not path.is_dir()}
    # Accounts and the janitor's lease come and go.
    return {path for path in files if ".kvrail" not in path.parts}


@pytest.fixture(scope="module")
def read_only(engines: Engines, llama: Path, store: Path) -> Iterator[dict[str, Any]]:
    """An engine whose directory becomes read-only, then one that starts with it so."""
    prompts = directory_prompts()
    known, new = select(prompts, " known"), select(prompts, " new", "large")
    steps = [
        step("generate", "cold", prompts=known),
        step("wait_for_chunks", directory=str(store), files=chunks_in(known)),
        step("set_mode", directory=str(store), mode=READ_ONLY),
        step("generate", "new", prompts=new),
        step("generate", "known", prompts=known),
        step("pause", seconds=1.0),
        step("generate", "newer", prompts=select(prompts, "newer")),
        step("metrics", "counters"),
    ]
    try:
        result, running = engines.run(Job(llama, steps, store, without_override=True))
        files = _everything(store)
        steps = [
            step("generate", "known", prompts=known),
            step("generate", "new", prompts=new),
            step("pause", seconds=0.6),
            step("generate", "newer", prompts=select(prompts, "newer")),
        ]
        started, other = engines.run(Job(llama, steps, store, without_override=True))
        yield {
            "result": result,
            "running": running,
            "files": files,
            "started": started,
            "started running": other,
            "files after start": _everything(store),
        }
    finally:
        for folder, _, _ in os.walk(store):
            os.chmod(folder, WRITABLE)


def test_a_directory_that_becomes_read_only(
    read_only: dict[str, Any], plain: dict[str, Any]
) -> None:
    result = read_only["result"]
    for phase in ("cold", "new", "known", "newer"):
        assert_same_answers(phase, plain, result[phase])
    known = result["known"]["directory known"]
    assert known["cached_tokens"] == loadable_tokens(700)
    counters = result["counters"]
    lost = sum(
        counters.get(f"kvrail:{name}_total", 0)
        for name in ("stores_failed", "stores_dropped_path_unwell")
    )
    # Of the last prompt, which came when the counters were about to be read, some may be missing.
    asked = chunks_in(select(directory_prompts(), " new", "large"))
    assert asked <= lost <= asked + chunks_in(select(directory_prompts(), "newer")), counters
    chunks = {path for path in read_only["files"] if path.suffix == ".safetensors"}
    assert len(chunks) == chunks_in(select(directory_prompts(), " known"))
    assert read_only["files"] - chunks == {chunks.pop().parents[2] / "manifest.json"}
    assert len(_warnings(read_only["running"])) == 1


def test_a_directory_that_is_read_only_at_start(
    read_only: dict[str, Any], plain: dict[str, Any]
) -> None:
    started = read_only["started"]
    for phase in ("known", "new", "newer"):
        assert_same_answers(phase, plain, started[phase])
    assert started["known"]["directory known"]["cached_tokens"] == loadable_tokens(700)
    assert read_only["files after start"] == read_only["files"]
    warnings = _warnings(read_only["started running"])
    # Scheduler and worker are two processes that each open the directory.
    assert 1 <= len(warnings) <= 2


@contextlib.contextmanager
def _small_file_system(folder: Path, size_mib: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], timeout=30, check=True)


@pytest.mark.parametrize(
    ("settings", "size_mib", "ballast_mib"),
    [({"min_free": 0}, 6, 0), ({}, 40, 35)],
    ids=["nothing kept free", "default"],
)
def test_a_full_file_system(
    engines: Engines,
    llama: Path,
    plain: dict[str, Any],
    tmp_path: Path,
    settings: dict[str, Any],
    size_mib: int,
    ballast_mib: int,
) -> None:
    """Room for a few of the prompt's 13 chunks of one MiB."""
    prompts = directory_prompts()
    large, newer = select(prompts, "large"), select(prompts, "newer")
    with _small_file_system(tmp_path / "small", size_mib) as folder:
        (folder / "ballast").write_bytes(bytes(ballast_mib * MIB))
        store = folder / "kv"
        steps = [
            step("generate", "cold", prompts=large),
            step("pause", seconds=0.6),
            step("generate", "newer", prompts=newer),
            step("generate", "again", prompts=large),
            step("metrics", "counters"),
            step("list_chunks", "chunks", directory=str(store)),
        ]
        result, running = engines.run(Job(llama, steps, store, settings=settings))
        for phase in ("cold", "newer", "again"):
            assert_same_answers(phase, plain, result[phase])
        chunks, counters = result["chunks"], result["counters"]
        print(f"{len(chunks)} chunks found room")
        assert 1 <= len(chunks) < chunks_in(large)
        assert len({Path(path).stat().st_size for path in chunks}) == 1, (
            "a partial chunk is visible"
        )
        assert not list(store.glob("*/tmp/*"))
        lost = sum(
            counters.get(f"kvrail:stores_{name}_total", 0)
            for name in ("failed", "dropped_no_space", "dropped_path_unwell")
        )
        assert lost >= chunks_in(large) - len(chunks)
        again = result["again"]["directory large"]
        loaded = moved(again, "kvrail:chunks_loaded_total")
        assert moved(again, "kvrail:loads_failed_total") == 0
        assert assert_loaded_is_stored([running], [running]) == 2 * loaded
        assert len(_warnings(running)) == 1
