"""One vLLM engine behind LMCache's connector: reads a job, answers its prompts, writes the result.

The job is a JSON file with `model`, `port`, `prompts` (name to token ids), `rounds` and `result`.
The result has for each round the answers by name, and the tokens that came from the cache. Between
rounds it waits for `settle` seconds, in which LMCache stores.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in completion.logprobs
        ],
        "cached": output.num_cached_tokens,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": job["port"]}
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
    )
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=5, ignore_eos=True)
    rounds = []
    for _ in range(job["rounds"]):
        answers = {}
        for name, prompt in job["prompts"].items():
            (output,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            answers[name] = _answer(output)
        rounds.append(answers)
        time.sleep(job["settle"])
    Path(job["result"]).write_text(json.dumps(rounds))


if __name__ == "__main__":
    main()
