"""Weights that are replaced while vLLM runs: no answer is ever made of another model's KV cache.

Two models of one shape stand for a model before and after a training step. vLLM alone, with the
second one, says what the right answers are.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny_model
from harness import Engines, Job, assert_same_answers, difference, moved, step
from prompts import chunks_in, loadable_tokens, main_prompts

HITS = "vllm:external_prefix_cache_hits_total"
WITH_CONNECTOR = {"reset_connector": True}
ONLY_VLLMS = {"reset_connector": False}


def _prompts() -> dict[str, list[int]]:
    return {name: main_prompts()[name] for name in ("boundary", "tail")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after its training."""
    return tiny_model.build_llama(tmp_path_factory.mktemp("models") / "trained", seed=11)


@pytest.fixture(scope="module")
def plain_trained(engines: Engines, trained: Path) -> dict[str, Any]:
    """The trained model's answers, by vLLM without kvrail."""
    result, _ = engines.run(Job(trained, [step("generate", prompts=_prompts())]))
    answers: dict[str, Any] = result["generate"]
    return answers


def _weights_step(folder: Path, reset: dict[str, bool]) -> list[dict[str, Any]]:
    """vLLM gets other weights, and forgets what it computed with those before."""
    name = f"{folder.name} {reset}"
    return [
        step("load_weights", f"load {name}", folder=str(folder)),
        step("reset_prefix_cache", f"reset {name}", **reset),
    ]


def _assert_hits(answers: dict[str, Any], *, expected: bool) -> None:
    for name, answer in answers.items():
        tokens = loadable_tokens(len(_prompts()[name])) if expected else 0
        assert moved(answer, HITS) == tokens, name


@pytest.mark.parametrize(
    ("ranks", "reset"),
    [(1, WITH_CONNECTOR), (1, ONLY_VLLMS), (2, ONLY_VLLMS)],
    ids=["connector told", "only vllm's cache", "two ranks"],
)
def test_chunks_of_other_weights_are_not_found(
    engines: Engines,
    llama: Path,
    trained: Path,
    plain: dict[str, Any],
    plain_trained: dict[str, Any],
    tmp_path: Path,
    ranks: int,
    reset: dict[str, bool],
) -> None:
    store, prompts = tmp_path / "kv", _prompts()
    files = chunks_in(prompts) * ranks
    wait = {"directory": str(store)}
    steps = [
        step("generate", "first", prompts=prompts),
        step("wait_for_chunks", "first stored", files=files, **wait),
        *_weights_step(trained, reset),
        step("generate", "trained", prompts=prompts),
        step("wait_for_chunks", "trained stored", files=2 * files, **wait),
        step("reset_prefix_cache", "reset", **reset),
        step("generate", "trained, again", prompts=prompts),
        *_weights_step(llama, reset),
        step("generate", "first, again", prompts=prompts),
    ]
    engine = {"enable_prefix_caching": True, "tensor_parallel_size": ranks}
    # Without this vLLM asks for a NUMA node for each rank.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
    result, running = engines.run(Job(llama, steps, store, engine=engine, environment=cores))
    for name, answer in result["trained"].items():
        with pytest.raises(AssertionError):
            difference(plain[name], answer, 0.01)
    assert_same_answers("first", plain, result["first"])
    assert_same_answers("trained", plain_trained, result["trained"])
    assert_same_answers("trained, again", plain_trained, result["trained, again"])
    assert_same_answers("first, again", plain, result["first, again"])
    _assert_hits(result["trained"], expected=False)
    # A reset says nothing of weights: what was stored with the same ones is found again.
    _assert_hits(result["trained, again"], expected=True)
    _assert_hits(result["first, again"], expected=True)
    assert running.log().count("vLLM has other weights than at its start") == 1
    assert running.log().count("vLLM has the weights of its start again") == 1
    if ranks == 1:
        _assert_shared(engines, llama, trained, plain_trained, store, reset)


def _assert_shared(
    engines: Engines,
    llama: Path,
    trained: Path,
    plain_trained: dict[str, Any],
    store: Path,
    reset: dict[str, bool],
) -> None:
    """Another instance that gets the same weights finds what the first one stored."""
    steps = [*_weights_step(trained, reset), step("generate", prompts=_prompts())]
    result, _ = engines.run(Job(llama, steps, store))
    assert_same_answers("second instance", plain_trained, result["generate"])
    _assert_hits(result["generate"], expected=True)


def test_weights_are_not_looked_at_before_a_paused_engine_has_its_new_ones(
    engines: Engines,
    llama: Path,
    trained: Path,
    plain: dict[str, Any],
    plain_trained: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The reset comes first, and a step for a request that is aborted before the weights."""
    store, prompts = tmp_path / "kv", _prompts()
    files = chunks_in(prompts)
    wait = {"directory": str(store)}
    steps = [
        step("generate", "first", prompts=prompts),
        step("wait_for_chunks", "first stored", files=files, **wait),
        step("load_weights_in_pause", folder=str(trained), prompt=prompts["boundary"]),
        step("generate", "trained", prompts=prompts),
        step("wait_for_chunks", "trained stored", files=2 * files, **wait),
    ]
    engine = {"enable_prefix_caching": True}
    result, running = engines.run(Job(llama, steps, store, engine=engine))
    assert_same_answers("first", plain, result["first"])
    assert_same_answers("trained", plain_trained, result["trained"])
    _assert_hits(result["trained"], expected=False)
    assert running.log().count("vLLM has other weights than at its start") == 1
