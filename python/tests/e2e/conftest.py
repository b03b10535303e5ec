"""Fixtures of the end-to-end tests: models, engines, and the answers of vLLM without kvrail."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where what they test is not installed, and says so."""
    missing = [name for name in ("vllm", "kvrail") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = f"needs {' and '.join(missing)}, not installed"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def socket_folder() -> Iterator[None]:
    """Where vLLM's processes put their sockets: one that is killed leaves its own behind."""
    with tempfile.TemporaryDirectory(prefix="kvrail-") as folder:
        os.environ["VLLM_RPC_BASE_PATH"] = folder
        yield
        del os.environ["VLLM_RPC_BASE_PATH"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with full attention."""
    import tiny_model

    return tiny_model.build_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts engines; ends those that a failed test left."""
    from harness import Engines

    engines = Engines(tmp_path_factory.mktemp("engines"))
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for the chunks of one test file; kvrail creates it."""
    folder = tmp_path_factory.mktemp("store")
    yield folder / "kv"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def plain(engines: Any, llama: Path) -> dict[str, Any]:
    """The answers of vLLM without kvrail to all prompts, in float32."""
    import prompts
    from harness import Job, step

    steps = [
        step("generate", "main", prompts=prompts.main_prompts()),
        step("generate", "others", prompts=prompts.other_prompts(), together=True),
        step(
            "generate",
            "crowd",
            prompts=prompts.crowd_prompts(),
            max_tokens=prompts.CROWD_TOKENS,
            together=True,
        ),
    ]
    result, _ = engines.run(Job(llama, steps))
    print(f"vLLM without kvrail started in {result['start_seconds']:.1f} s")
    answers: dict[str, Any] = result["main"] | result["others"] | result["crowd"]
    return answers
