"""`vllm serve` with LMCache's own command, unchanged, across a restart."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Engines
from prompts import chunks_in, loadable_tokens, main_prompts

START_SECONDS = 240.0
DISK = 'vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="tiny",source="disk"}'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(url: str, body: dict[str, Any] | None = None) -> str:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())


@contextlib.contextmanager
def _served(llama: Path, folder: Path, log: Path) -> Iterator[str]:
    port = _free_port()
    (folder / "gds-backend.yaml").write_text(
        f"local_cpu: false\nchunk_size: 256\ngds_path: {folder / 'kv'}\ncufile_buffer_size: 64\n"
    )
    environment = os.environ | {
        "LMCACHE_CONFIG_FILE": str(folder / "gds-backend.yaml"),
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    transfer = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(llama)]
    command += ["--kv-transfer-config", transfer]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(server, f"http://127.0.0.1:{port}", log)
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            _get(f"{address}/health")
            return address
        time.sleep(0.25)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-6000:]}")


def _complete(address: str, prompt: list[int]) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 5}
    body["ignore_eos"] = True
    return dict(json.loads(_get(f"{address}/v1/completions", body))["choices"][0])


def _counter(address: str, name: str) -> float:
    for line in _get(f"{address}/metrics").splitlines():
        if line.startswith(name):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def _wait_for_counter(address: str, name: str, value: float) -> None:
    """Counters come with the steps of the engine, at most twice a second; so keep it stepping."""
    deadline = time.monotonic() + 10
    while (found := _counter(address, name)) != value:
        assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
        _complete(address, [1, 2, 3])
        time.sleep(0.1)


def test_the_command_of_lmcache_runs_on_kvrail(
    engines: Engines, llama: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    if shutil.which(str(Path(sys.executable).with_name("vllm"))) is None:
        pytest.skip("needs the command `vllm` beside this Python")
    prompt = main_prompts()["long"]
    logs = [tmp_path / "cold.log", tmp_path / "warm.log"]
    chunks = chunks_in({"long": prompt})
    with _served(llama, tmp_path, logs[0]) as address:
        cold = _complete(address, prompt)
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "kv").glob("*/g0r*/*/*.safetensors"))) < chunks:
            assert time.monotonic() < deadline, logs[0].read_text()[-6000:]
            time.sleep(0.1)
        _wait_for_counter(address, "kvrail:chunks_stored_total", chunks)
    with _served(llama, tmp_path, logs[1]) as address:
        warm = _complete(address, prompt)
        _wait_for_counter(address, "kvrail:chunks_loaded_total", chunks)
        assert _counter(address, DISK) == loadable_tokens(len(prompt))
        assert _counter(address, "kvrail:hit_tokens_total") == loadable_tokens(len(prompt))
        assert _counter(address, "kvrail:bytes_loaded_total") > 0
        metrics = [li for li in _get(f"{address}/metrics").splitlines() if li.startswith("kvrail:")]
    print("\n".join(metrics))
    assert cold["text"] == warm["text"]
    pairs = zip(cold["logprobs"]["token_logprobs"], warm["logprobs"]["token_logprobs"], strict=True)
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    print(f"served cold and warm: largest difference of log-probabilities {largest:.2e}")
    assert largest <= 1e-4
