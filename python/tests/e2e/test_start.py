"""What cannot work ends vLLM's start with a message that says what to change."""

from pathlib import Path
from typing import Any

import pytest
from harness import Engines, Job

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "chunk size": ({"chunk_size": 200}, "expected a multiple of vLLM's block size, 128"),
    "buffer": ({"gds_buffer_size": 1, "chunk_size": 512}, "expected at least 3 (MiB)"),
    "misspelt key": ({"chunk_sise": 256}, "chunk_size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_setting_ends_the_start(
    engines: Engines, llama: Path, tmp_path: Path, mistake: str
) -> None:
    settings, expected = MISTAKES[mistake]
    running = engines.start(Job(llama, [], tmp_path / "kv", settings=settings))
    assert running.exit_status() != 0
    errors = [line for line in running.log().splitlines() if "ConfigError" in line]
    print(errors[-1] if errors else running.log()[-2000:])
    assert any(expected in line for line in errors)
    key = next(iter(settings)) if mistake != "buffer" else "buffer_size"
    assert any(key in line for line in errors)
