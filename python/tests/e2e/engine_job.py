"""Runs one vLLM engine through a list of steps, in a process of its own.

`run` takes a job, a plain JSON object: `engine` holds the arguments of `vllm.LLM`, `steps` what to
do with it in order. What the steps gave is returned as another JSON object, by the steps' names.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOGPROBS = 20
POLL_SECONDS = 0.05


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Starts the engine, runs the steps, stops the engine."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # vLLM's MultiConnector asks for its members' statistics by their registered names.
    name = "RecordingConnector"
    KVConnectorFactory.register_connector(name, "recording_connector", name)
    arguments = dict(job["engine"])
    if arguments.get("kv_transfer_config") is not None:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    started = time.monotonic()
    llm = LLM(**arguments)
    results: dict[str, Any] = {"start_seconds": time.monotonic() - started}
    try:
        for step in job["steps"]:
            action = STEPS[step["do"]]
            results[step.get("name", step["do"])] = action(llm, **step.get("with", {}))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return results


def generate(
    llm: Any,
    prompts: dict[str, list[int] | str],
    salt: str | None = None,
    max_tokens: int = 8,
    together: bool = False,
) -> dict[str, Any]:
    """Greedy decoding of each prompt: tokens, log-probabilities, seconds, how the counters moved.

    One by one unless `together`, so that the counters can be told apart by prompt.
    """
    parameters = _parameters(max_tokens)
    batches = [list(prompts)] if together else [[name] for name in prompts]
    answers = {}
    for batch in batches:
        inputs = [_input(prompts[name], salt) for name in batch]
        before, started = metrics(llm), time.monotonic()
        outputs = llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.monotonic() - started
        moved = _difference(before, metrics(llm))
        for name, output in zip(batch, outputs, strict=True):
            answers[name] = _answer(output) | {"moved": moved, "seconds": seconds}
    return answers


def wait_for_hit(llm: Any, prompt: list[int], seconds: float = 60.0) -> dict[str, Any]:
    """Asks again and again until chunks are loaded for `prompt`; how many times and how long."""
    started, asked = time.monotonic(), 0

    def hit() -> bool | None:
        nonlocal asked
        asked += 1
        output = llm.generate([_input(prompt, None)], _parameters(1), use_tqdm=False)[0]
        return bool(output.num_cached_tokens) or None

    _wait(hit, seconds, lambda: "a hit")
    return {"seconds": time.monotonic() - started, "asked": asked}


def abort(
    llm: Any, aborted: dict[str, list[int]], kept: dict[str, list[int]], steps: int
) -> dict[str, Any]:
    """Submits all prompts, aborts `aborted` after `steps` engine steps, finishes `kept`."""
    engine = llm.llm_engine
    parameters = _parameters(8)
    for name, tokens in (aborted | kept).items():
        engine.add_request(name, _input(tokens, None), parameters)
    outputs: dict[str, Any] = {}
    for _ in range(steps):
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    unfinished = [name for name in aborted if name not in outputs]
    engine.abort_request(unfinished)
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    answers = {name: _answer(outputs[name]) for name in kept}
    return {"answers": answers, "aborted": unfinished}


def die(llm: Any, prompt: list[int], attempts: int = 3) -> dict[str, Any]:
    """Asks a prompt until the engine dies: how vLLM says so, and after how many seconds.

    It may answer first: on a busy machine a lookup that takes too long is a miss.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    for _ in range(attempts):
        started = time.monotonic()
        try:
            llm.generate([_input(prompt, None)], _parameters(8), use_tqdm=False)
        except EngineDeadError as error:
            return {"error": str(error), "seconds": time.monotonic() - started}
    raise AssertionError("the engine does not die")


def metrics(llm: Any) -> dict[str, float]:
    """All counters of vLLM and kvrail that the front end has, by name and labels."""
    from prometheus_client import REGISTRY

    values = {}
    for family in REGISTRY.collect():
        if not family.name.startswith(("vllm", "kvrail")):
            continue
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = {
                key: value
                for key, value in sorted(sample.labels.items())
                if key not in ("engine", "model_name")
            }
            text = ",".join(f"{key}={value}" for key, value in labels.items())
            values[f"{sample.name}{{{text}}}" if text else sample.name] = sample.value
    return values


def wait_for_chunks(llm: Any, directory: str, files: int, seconds: float = 20.0) -> list[str]:
    """Waits until `directory` holds at least `files` chunk files and returns those it holds."""

    def found() -> list[str] | None:
        paths = chunk_files(Path(directory))
        return [str(path) for path in paths] if len(paths) >= files else None

    paths: list[str] = _wait(
        found, seconds, lambda: f"{files} chunk files, not {chunk_files(Path(directory))}"
    )
    return paths


def wait_for_files(
    llm: Any, directory: str, pattern: str, files: int, seconds: float = 20.0
) -> list[str]:
    """Waits until `directory` holds at least `files` files of a pattern; returns those it holds."""

    def found() -> list[str] | None:
        paths = sorted(Path(directory).rglob(pattern))
        return [str(path) for path in paths] if len(paths) >= files else None

    paths: list[str] = _wait(found, seconds, lambda: f"{files} files {pattern}")
    return paths


def list_chunks(llm: Any, directory: str) -> dict[str, list[int]]:
    """The chunk files of a directory with their inode numbers and times of last change."""
    found = {str(path): path.lstat() for path in chunk_files(Path(directory))}
    return {path: [status.st_ino, status.st_mtime_ns] for path, status in found.items()}


def wait_for_file(llm: Any, path: str, seconds: float = 120.0) -> None:
    """Waits until another process made the file `path`."""
    _wait(lambda: Path(path).exists() or None, seconds, lambda: path)


def make_file(llm: Any, path: str, text: str = "") -> None:
    """Makes a file at once, whole: for another process, or for the test connector."""
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)


def reset_prefix_cache(llm: Any, reset_connector: bool = False) -> bool:
    """Empties vLLM's own cache, so that the next hit can only come from chunks."""
    return bool(llm.reset_prefix_cache(reset_connector=reset_connector))


def load_weights(llm: Any, folder: str) -> None:
    """Replaces the weights in memory by those of another folder, as a trainer does."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})


def load_weights_in_pause(llm: Any, folder: str, prompt: list[int]) -> None:
    """Replaces the weights as vLLM's documentation of `pause_generation` has it.

    Meanwhile a request comes and is aborted, for which the paused engine runs a step.
    """
    engine, core = llm.llm_engine, llm.llm_engine.engine_core
    core.call_utility("pause_scheduler", "keep", True)
    engine.add_request("gone", _input(prompt, None), _parameters(1))
    engine.abort_request(["gone"])
    for _ in range(3):
        # Each is answered between two rounds of the engine's loop.
        assert core.call_utility("is_scheduler_paused")
    load_weights(llm, folder)
    core.call_utility("resume_scheduler")


def set_mode(llm: Any, directory: str, mode: int) -> None:
    """Gives every folder under `directory`, itself included, this mode."""
    for folder, _, _ in os.walk(directory, topdown=False):
        os.chmod(folder, mode)


def pause(llm: Any, seconds: float) -> None:
    """Sleeps: for what must not happen although there was time for it."""
    time.sleep(seconds)


def chunk_files(directory: Path) -> list[Path]:
    """The chunk files of all namespaces in `directory` by final name, whole or damaged."""
    return sorted(directory.glob("*/g*r*/*/*.safetensors"))


STEPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        abort,
        die,
        generate,
        list_chunks,
        load_weights,
        load_weights_in_pause,
        make_file,
        metrics,
        pause,
        reset_prefix_cache,
        set_mode,
        wait_for_chunks,
        wait_for_file,
        wait_for_files,
        wait_for_hit,
    )
}


def _parameters(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=LOGPROBS,
        ignore_eos=True,
        detokenize=False,
    )


def _input(tokens: list[int] | str, salt: str | None) -> dict[str, Any]:
    text = isinstance(tokens, str)
    prompt: dict[str, Any] = {"prompt" if text else "prompt_token_ids": tokens}
    return prompt if salt is None else prompt | {"cache_salt": salt}


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in completion.logprobs
        ],
        "finish_reason": completion.finish_reason,
        "cached_tokens": output.num_cached_tokens,
    }


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    changes = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: change for name, change in changes.items() if change}


def _wait(found: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    deadline = time.monotonic() + seconds
    while (value := found()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what()}")
        time.sleep(POLL_SECONDS)
    return value
