"""``kvrail-explain`` on what a real engine stored: from text and tokens to the lost chunk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import Engines, Job, chunk_keys, chunk_path, moved, step
from prompts import CHUNK_TOKENS, reuse_prompts, select

LOST = 2


def explain(store: Path, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvrail.vllm.explain", str(store), *map(str, arguments)]
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


def test_a_prompt_of_a_real_engine_is_explained(
    engines: Engines, llama: Path, store: Path, tmp_path: Path
) -> None:
    prompts = select(reuse_prompts(), "salted")
    ((name, tokens),) = prompts.items()
    # Every byte of this text is a token to the tiny model. The engine makes the tokens itself.
    text = "".join(chr(ord("a") + index * index % 26) for index in range(3 * CHUNK_TOKENS + 5))
    files = 2 * (len(tokens) // CHUNK_TOKENS) + len(text) // CHUNK_TOKENS
    steps = [
        step("generate", "plain", prompts=prompts),
        step("generate", "salted", prompts=prompts, salt="blue"),
        step("generate", "text", prompts={"text": text}),
        step("wait_for_chunks", directory=str(store), files=files),
    ]
    _, running = engines.run(Job(llama, steps, store))
    tokens_file = tmp_path / "tokens.json"
    tokens_file.write_text(json.dumps(tokens))

    # The keys are those of the engine's own hashes.
    for salt in (None, "blue"):
        salted = ("--cache-salt", salt) if salt else ()
        (found,) = explain(store, "--tokens-file", tokens_file, *salted)["namespaces"]
        assert [chunk["key"] for chunk in found["chunks"]] == chunk_keys(running, tokens, salt)[
            : len(found["chunks"])
        ]
        assert found["usable"] == len(found["chunks"]) == (len(tokens) - 1) // CHUNK_TOKENS

    (found,) = explain(store, "--text", text, "--model", llama)["namespaces"]
    assert found["usable"] == len(text) // CHUNK_TOKENS == 3

    # A chunk is lost: what is explained is what a second engine then loads.
    chunk_path(store, chunk_keys(running, tokens)[LOST]).unlink()
    (found,) = explain(store, "--tokens-file", tokens_file)["namespaces"]
    assert (found["usable"], found["usable_tokens"]) == (LOST, LOST * CHUNK_TOKENS)
    verdicts = [chunk["verdict"] for chunk in found["chunks"]]
    assert verdicts.index("never seen") == LOST and verdicts.count("hit") == len(verdicts) - 1
    first, last = LOST * CHUNK_TOKENS, (LOST + 1) * CHUNK_TOKENS
    expected = f"the first miss is chunk {LOST} (tokens {first}..{last}): absent"
    assert expected in found["answer"], found["answer"]
    result, _ = engines.run(Job(llama, [step("generate", prompts=prompts)], store))
    hits = moved(result["generate"][name], "vllm:external_prefix_cache_hits_total")
    assert hits == found["usable_tokens"]
